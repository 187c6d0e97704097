#!/usr/bin/env bash
# transformers 5.24.0: continue_final_message keeps the end of a step or drops it, by the template.
#
# apply_chat_template(continue_final_message=True) renders a chat whose last message is unfinished,
# so that the model goes on with it. A message that ends with an empty line keeps it where the
# template writes messages as they are (ChatML does), and loses it where the template trims them
# (Llama 3's and others' do), although what is trimmed there is a mark that comes after the empty
# line: the line is cut off afterwards. Any other use of the same template with text appended by
# hand keeps it.
#
# Hurts: search and scoring by steps, which hand back "Step 1: ...\n\n" for the next one. Under one
# model the next step begins, under another the model is put back to the end of the last line, and
# may go on with that line or spend its first token on the separator; step counts and token ids of
# the beginning differ from those that were sampled. Nothing is raised.
# The right guess: keep token ids, and append what was sampled to the ids of the generation prompt.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
install() { venv/bin/python -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install transformers==5.24.0 tokenizers==0.23.3 jinja2==3.1.6
cat >case.py <<'EOF'
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

core = Tokenizer(models.BPE({"<unk>": 0}, [], unk_token="<unk>"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
step = "Step 1: 3 boxes of 4 are 12.\n\n"
chat = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": step}]


def template(content):
    return (
        "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ CONTENT }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    ).replace("CONTENT", content)


print("transformers", transformers.__version__)
kept = {}
for name, content in {"as it is": "m['content']", "trimmed": "m['content'] | trim"}.items():
    how = dict(chat_template=template(content), tokenize=False)
    continued = tokenizer.apply_chat_template(chat, continue_final_message=True, **how)
    by_hand = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, **how) + step
    kept[name] = continued == by_hand
    print(f"content {name}: ends with {continued[-8:]!r}; appended by hand: {by_hand[-8:]!r}")
raise SystemExit(0 if kept == {"as it is": True, "trimmed": False} else "no longer as described")
EOF
venv/bin/python -I case.py
