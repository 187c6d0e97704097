"""transformers' own doors to `generate`, with what they give without kvtools beside it."""

import functools
import inspect
import threading

import pytest
import torch
import transformers

import kvtools

CHATS = [
    [{"role": "user", "content": "Name a river."}],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "And a hill?"}],
]


@pytest.fixture
def pipe(model, tokenizer):
    return transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls that went through kvtools."""
    module = __import__("sys").modules["kvtools.hf.generate"]
    found, stock = [], module._generate
    monkeypatch.setattr(module, "_generate", lambda *args: found.append(1) or stock(*args))
    return found


@pytest.mark.parametrize(
    "what, texts, options",
    [
        ("texts in batches", ["Once upon", "A", "One more text"], dict(batch_size=3)),
        ("chats", CHATS, dict(batch_size=2)),
        ("return_full_text=False", "Once", dict(return_full_text=False)),
        ("return_tensors", "Once", dict(return_tensors=True)),
        ("stop_sequence", "Once", dict(stop_sequence="e")),
        ("num_return_sequences", "Once", dict(num_return_sequences=3, top_k=1)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("door", ["patch", "custom_generate"])
def test_pipeline(what, texts, options, door, pipe, calls, record):
    options = dict(max_new_tokens=8, do_sample="num_return_sequences" in options) | options
    wanted = pipe(texts, **options)
    assert not calls
    if door == "custom_generate" and "stop_sequence" in options:
        with pytest.raises(ValueError, match="stop strings"):  # generate does not hand them on
            pipe(texts, custom_generate=kvtools.generate, **options)
        return
    if door == "patch":
        with kvtools.patch(pipe.model):
            found = pipe(texts, **options)
    else:
        found = pipe(texts, custom_generate=kvtools.generate, **options)
    assert found == wanted and calls
    record("transformers", f"pipeline, by {door}: {what}", "as without")


OPTIONS = [
    dict(eos_token_id=[0, 101, 110]),
    dict(repetition_penalty=1.3),
    dict(no_repeat_ngram_size=2),
    dict(min_new_tokens=6, eos_token_id=[*range(128)]),
    dict(suppress_tokens=[*range(200)]),
    dict(begin_suppress_tokens=[*range(100, 200)]),
    dict(bad_words_ids=[[x] for x in range(0, 256, 2)]),
    dict(sequence_bias=[[[120], 100.0]]),
    dict(forced_eos_token_id=33),
    dict(exponential_decay_length_penalty=(2, 1.5)),
    dict(stop_strings=["e", "x"]),
    dict(do_sample=True, top_k=1, temperature=0.7, top_p=0.9, min_p=0.05, typical_p=0.9),
    dict(max_length=30, max_new_tokens=None),
    dict(renormalize_logits=True, remove_invalid_values=True),
    dict(cache_implementation="static"),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: next(iter(x)))
def test_generation_config_of_a_folder(options, model, tokenizer, words, calls, tmp_path, record):
    """What a checkpoint's generation_config.json says holds, with and without kvtools."""
    model.generation_config.update(max_new_tokens=10, do_sample=False)
    model.generation_config.update(**options)
    model.save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    inputs = tokenizer(words(20, 13, 20), return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    extra = dict(tokenizer=tokenizer) if "stop_strings" in options else {}
    wanted = model.generate(**inputs, **extra)
    with kvtools.patch(model):
        found = model.generate(**inputs, **extra)
    assert torch.equal(found, wanted) and calls
    record("transformers", f"generation_config: `{', '.join(options)}`", "as without")


@pytest.mark.parametrize("door", ["patch", "custom_generate"])
def test_streaming(door, model, tokenizer, calls, record):
    """Word by word, from another thread, after a chat template."""
    ids = tokenizer.apply_chat_template(
        CHATS[0], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids.pop("token_type_ids", None)

    def stream(**options):
        streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        if "custom_generate" in options:  # generate does not hand the streamer on
            options["custom_generate"] = functools.partial(kvtools.generate, streamer=streamer)
        else:
            options["streamer"] = streamer
        options |= dict(ids, max_new_tokens=12, do_sample=False)
        thread = threading.Thread(target=model.generate, kwargs=options)
        thread.start()
        parts = list(streamer)
        thread.join()
        return parts

    wanted = stream()
    if door == "patch":
        with kvtools.patch(model):
            found = stream()
    else:
        found = stream(custom_generate=True)
    assert found == wanted and len(found) > 1 and calls
    record("transformers", f"TextIteratorStreamer: by {door}", "as without")


def test_serve_takes_no_model(record):
    """Nor a loop: docs/ecosystem.md says so."""
    serve = pytest.importorskip("transformers.cli.serve")
    options = inspect.signature(serve.Serve.__init__).parameters
    assert "force_model" in options and not {"model", "custom_generate"} & options.keys()
    record("transformers", "`transformers serve`", "takes no patched model, and no loop")
