"""What is imported in place of the C++ module of this name where it was not built."""

raise ImportError(
    "kvtools was installed without its C++ part: reinstall it with this Python, a C++17 compiler "
    "and without KVTOOLS_EXT=0",
    name=__name__,
)
