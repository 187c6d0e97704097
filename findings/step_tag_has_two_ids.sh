#!/usr/bin/env bash
# Mistral's tokenizer (mistral-common 1.13.1, sentencepiece 0.2.3): a step tag has two ids.
#
# Process reward models in the Math-Shepherd manner end each step with a tag and find it by its
# id, taken once from encode(tag)[-1]. In Mistral's first tokenizer that is the id of the tag with
# a word start (12902). Glued to what stands before it, to a digit, a full stop or a line break,
# the tag is another token (1107). Looking for the first id in such a text finds no step at all.
#
# Hurts: whoever formats steps as "text\nTAG" or "textTAG": no step end is found, and whether
# anybody notices depends on what the caller does with no scores.
# The right guess: a tag is one token only with the characters around it. Put the blank before it,
# and count the tags found against the steps given.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
install() { venv/bin/python -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install --no-deps sentencepiece==0.2.3
install --no-deps mistral-common==1.13.1
cat >case.py <<'EOF'
from importlib.metadata import files, version

from sentencepiece import SentencePieceProcessor

for name in ("mistral-common", "sentencepiece"):
    print(name, version(name))
path = next(f.locate() for f in files("mistral-common") if f.name == "tokenizer.model.v1")
encode = SentencePieceProcessor(model_file=str(path)).encode
tag = "\u043a\u0438"
tag_id = encode(tag)[-1]
print("id of the tag by itself:", tag_id)


def found(between):
    """Step ends found in a text of two steps, and the last token's id."""
    ids = encode("".join(f"Step {i}: {i}+{i}={2 * i}.{between}{tag}\n" for i in (1, 2)))
    return ids.count(tag_id), ids[-2]


counts = {}
for between in (" ", "", "\n"):
    counts[between], last = found(between)
    print(f"{between!r} before the tag: {counts[between]} of 2 found, the tag's id is {last}")
as_described = counts == {" ": 2, "": 0, "\n": 0}
raise SystemExit(0 if as_described else "no longer as described")
EOF
venv/bin/python -I case.py
