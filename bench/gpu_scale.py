"""How much bench.gpu measures: in full, a case of each kernel, and in a rehearsal on a CPU."""

from dataclasses import dataclass, field

from bench import bench_evict, bench_quant, bench_sampling, bench_scoring
from kvtools.ops.quant import FORMATS

ROWS = [f"tests/test_{x}.py" for x in ("quant", "attention", "evict", "sampling", "scoring")]
LLAMA_8B = dict(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131_072,
)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    tests: dict[str, list[str]] = field(default_factory=lambda: {
        "triton": [*ROWS, "-k", "triton"],
        "cuda": [*ROWS, "-k", "cuda"],
        "end to end": ["tests/test_gpu.py", "tests/test_attention.py", "-m", "gpu"],
    })  # fmt: skip
    smoked: dict[str, str] = field(default_factory=dict)  # cells by part, if not all
    formats: tuple = tuple(x for x in FORMATS if x != "none")
    copied: int = 2**31  # bytes
    product: int = 8192  # rows and columns
    rounds: int = 25
    # KV heads, query heads of each, head size: Llama-3-8B's and Qwen2.5-7B's.
    heads: tuple = (("llama", (8, 4, 128)), ("qwen", (4, 7, 128)))
    shared: tuple = (
        (64, 8192, 256),
        (1, 8192, 256),
        (4, 8192, 256),
        (16, 8192, 256),
        (64, 2048, 512),
        (64, 32_768, 512),
        (256, 8192, 256),
        (256, 8192, 2048),
    )
    long: tuple = ((64, 4096), (16, 16_384))  # rows and tokens, nothing shared
    short: tuple = ((64, 512), (256, 256), (256, 1024))
    flex: tuple = ("llama 64 x 8192 + 256", "qwen 64 x 8192 + 256", "llama 64 x 4096")
    trees: tuple = (
        "1,10 / 4000,400", "1,256 / 256,32", "1,1024 / 2048,32",
        "1,4,16,512 / 1024,256,128,32", "1,4,16,64,256,1024 / 256,32,256,64,32,256",
        "1,2,4,8,16,32,64,128,1024 / 16,16,16,16,16,16,16,16,16", "256 / 1024", "256 / 4096",
    )  # fmt: skip
    tree_heads: tuple = ((32, 32), (16, 8), (32, 8), (64, 8), (16, 1))  # query heads, KV heads
    tree_d: int = 128
    appended: tuple = (
        bench_quant.Shape(64, 8, 128),
        bench_quant.Shape(256, 8, 128),
        bench_quant.Shape(8192, 8, 128),
    )
    evicted: tuple = (
        bench_evict.Shape(1, 8, 4, 8192, 128, 32, 6144),
        bench_evict.Shape(64, 8, 4, 640, 128, 16, 64),
    )
    logits: tuple = tuple(bench_sampling.Shape(b, 151_936) for b in (1, 16, 64, 256))
    scored: tuple = (bench_scoring.Shape(16, 8192, 256, 4096, 128_256),)
    model: dict = field(default_factory=lambda: LLAMA_8B)
    decoded: tuple = ((16, 2048), (64, 2048), (64, 8192))  # rows and prompt
    generated: tuple = (32, 2048, 64)  # rows, prompt, new tokens


# The heads, the vocabulary and so on of the headlines, so that the same kernels are compiled.
SMALL = Scale(
    heads=Scale().heads[:1], shared=((64, 32, 16),), long=((64, 48),), short=(), flex=(),
    appended=(bench_quant.Shape(64, 8, 128),), logits=(bench_sampling.Shape(4, 151_936),),
    evicted=(bench_evict.Shape(4, 8, 4, 640, 128, 16, 64),),
    scored=(bench_scoring.Shape(4, 64, 16, 4096, 512),), smoked={"attention": "formats"},
)  # fmt: skip
DRY = Scale(
    tests={
        "triton": ["tests/test_layers.py", "-k", "imports_go_up_only"],
        "cuda": ["tests/test_layers.py", "-k", "stream"],
        "end to end": ["tests/test_gpu.py", "-k", "test_session"],
    },
    formats=("int4",), smoked={"attention": "formats", "sampling": ".*top_k"},
    copied=2**16, product=64, rounds=1, heads=(("llama", (1, 4, 16)),), shared=((2, 16, 8),),
    long=((1, 24),), short=((2, 8),), flex=("llama 2 x 16 + 8",),
    trees=("1,2,4 / 16,16,5", "3 / 8"), tree_heads=((2, 1),), tree_d=16,
    appended=(bench_quant.Shape(16, 2, 16),), evicted=(bench_evict.Shape(2, 2, 2, 32, 16, 8, 4),),
    logits=(bench_sampling.Shape(2, 300),), scored=(bench_scoring.Shape(2, 16, 4, 32, 300),),
    model=LLAMA_8B | dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                          num_attention_heads=4, num_key_value_heads=2),
    decoded=((2, 20),), generated=(2, 20, 3),
)  # fmt: skip
