"""Process reward models: every family against its published reader, and scores of growing rows."""

import copy
import functools
import json
import re

import numpy as np
import pytest
import readers
import torch
from models import COMMON, Counter, scaled, tiny_model
from rich.console import Console
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForTokenClassification,
)

from bench import prm as bench
from kvtools import CacheConfig, Rollouts, prm, search
from kvtools import models as loading
from kvtools.prm.families import PURE, QwenPRM, ReasonEval
from kvtools.prm.heads import LogRatio, StepHead, TokenHead
from kvtools.prm.qwen import Headed

QUESTION = "Tom has 5 coins and gets 7 more. How many has he?"
STEPS = ["Step 1: 5 + 7 = 12.", "Step 2: he has 12 coins", "The answer is 12!", "Check: 12 - 7 = 5",
         "Step 2: it is 13.", "So 13"]  # fmt: skip
SOLUTIONS = [STEPS[:3], [STEPS[0]], [], [STEPS[0], *STEPS[4:], STEPS[3]], [STEPS[2]]]
EMPTY = [[STEPS[0], "", STEPS[2]], [STEPS[1], STEPS[2], ""], [" ", STEPS[4] + "\n\n"]]
TEXT = f"{QUESTION} {' '.join(STEPS)} right or wrong - yes + no, and so on.\n\n"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "<s>{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_end|>\n\n{% endif %}"
)
SPECIAL = ["<s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<extra_0>", "[PRM]"]


@functools.cache
def byte_level(bos="adds", pad="<pad>", template=HEADERS, words=("ки", "\n\n\n\n", "\n\n\n\n\n")):
    """A byte-level BPE with the tags of Llama's and Qwen's families, trained on the spot.

    Args:
        bos: whether the tokenizer "adds" it, only "has" it, or does not (None).
        words: what becomes a token with a blank before it.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    corpus = [
        TEXT,
        *words,
        *(f"a {word}" for word in words),
        *(f"Step 1. {word}" for word in words),
    ]
    backend.train_from_iterator(corpus * 3, trainer)
    if bos == "adds":
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>" if bos else None, pad_token=pad,
        chat_template=template, clean_up_tokenization_spaces=False,
    )  # fmt: skip


@functools.cache
def metaspace(prepend="first"):
    """Pieces that begin with a blank, as in Mistral's; line breaks are alone."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("\n", "isolated"),
        pre_tokenizers.Metaspace(prepend_scheme=prepend),
    ])  # fmt: skip
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", *SPECIAL], show_progress=False,
        initial_alphabet=list("0123456789"),
    )  # fmt: skip
    backend.train_from_iterator([f"{TEXT} ки, then. ки\n"] * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", unk_token="<unk>"
    )


SHAPE = COMMON | dict(vocab_size=640, hidden_size=32, intermediate_size=48, num_hidden_layers=2)


def config(kind, **more):
    return kind(**SHAPE, **more)


def made(make, seed=0):
    """A model with random weights, large enough to have opinions."""
    torch.manual_seed(seed)
    model = scaled(make().float())
    for name, weight in model.named_parameters():
        if "score" in name or "v_head" in name:
            nn.init.normal_(weight, std=0.3)
    return model


def headed(kind, name, width):
    head = nn.Linear(SHAPE["hidden_size"], width)
    return Headed(kind, name, nn.ModuleDict({"summary": head}) if name == "v_head" else head)


def llama(kind=LlamaForCausalLM, **more):
    return kind(config(LlamaConfig, **more))


def qwen(kind=Qwen2ForCausalLM, **more):
    return kind(config(Qwen2Config, **more))


# Of each family: tokenizer, model, the published reader, and that of its quirks where another one.
CASES = {
    "qwen": (
        functools.partial(byte_level, None, template=TURNS),
        lambda: qwen(prm.Qwen2ForProcessRewardModel), readers.qwen, readers.qwen,
    ),
    "math-shepherd": (
        metaspace, lambda: MistralForCausalLM(config(MistralConfig)), readers.math_shepherd,
        readers.math_shepherd_search,
    ),
    "rlhflow": (byte_level, llama, readers.rlhflow, readers.rlhflow_search),
    "skywork": (
        functools.partial(byte_level, "has"),
        lambda: headed(qwen(), "v_head", 1), readers.skywork, readers.skywork,
    ),
    "openr": (
        functools.partial(byte_level, None), lambda: qwen(), readers.openr,
        readers.openr,
    ),
    "versa": (byte_level, llama, readers.versa, readers.versa),
    "er-prm": (byte_level, llama, readers.er_prm, readers.er_prm_authors),
    "pqm": (
        byte_level, lambda: headed(llama(), "v_head", 1), readers.pqm, readers.pqm,
    ),
    "trl": (
        byte_level, lambda: llama(LlamaForTokenClassification, num_labels=2), readers.trl,
        readers.trl,
    ),
    "prm800k": (
        byte_level, lambda: llama(LlamaForTokenClassification, num_labels=3),
        readers.prm800k, readers.prm800k,
    ),
    "pure": (
        functools.partial(byte_level, None),
        lambda: qwen(Qwen2ForTokenClassification, num_labels=2), readers.pure,
        readers.pure,
    ),
    "reasoneval": (
        byte_level, lambda: headed(llama(LlamaModel), "score_head", 3), readers.reasoneval,
        readers.reasoneval,
    ),
    "implicit": (
        functools.partial(byte_level, None, template=TURNS), llama, readers.implicit,
        readers.implicit_card,
    ),
}  # fmt: skip


@functools.cache
def parts(family):
    """Tokenizer, model and reference model of a family."""
    tokenizer, make, *_ = CASES[family]
    reference = made(make, seed=1) if family == "implicit" else None
    return tokenizer(), made(make), reference


@functools.cache
def reward_model(family, quirks=False):
    tokenizer, model, reference = parts(family)
    return prm.load(model, tokenizer, family, reference=reference, reference_quirks=quirks)


def published(family, solutions, side="right", quirks=False, question=QUESTION):
    tokenizer, model, reference = parts(family)
    reader = CASES[family][3 if quirks else 2]
    extra = () if reference is None else (reference,)
    todo = [steps for steps in solutions if steps]
    scores = iter(reader(model, tokenizer, question, todo, side, *extra))
    return [next(scores) if steps else [] for steps in solutions]


def scores_of(family, scores):
    """What the published reader gives: EurusPRM's prints margins."""
    return scores.margins if family == "implicit" else scores.probs


def assert_scores(found, want):
    assert [len(x) for x in found] == [len(x) for x in want]
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(torch.as_tensor(x), torch.tensor(y), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", CASES)
def test_scores_are_the_published_readers(family, side):
    model, want = reward_model(family), published(family, SOLUTIONS, side)
    assert_scores(scores_of(family, model.score(QUESTION, SOLUTIONS, batch=3)), want)
    flat = [x for row in want for x in row]
    assert max(flat) - min(flat) > 1e-3, "the model has no opinion"
    dropped = [[step.strip() for step in steps if step.strip()] for steps in EMPTY]
    found = scores_of(family, model.score(QUESTION, EMPTY))
    assert_scores(found, published(family, dropped, side))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", CASES)
def test_quirks_are_the_published_readers(family, side):
    solutions = [x for x in SOLUTIONS + EMPTY if x]
    found = scores_of(family, reward_model(family, quirks=True).score(QUESTION, solutions))
    assert_scores(found, published(family, solutions, side, quirks=True))


def test_redundancy():
    tokenizer, model, _ = parts("reasoneval")
    found = prm.load(model, tokenizer, functools.partial(ReasonEval, redundancy=True))
    solutions = [steps for steps in SOLUTIONS if steps]
    want = readers.redundancy(model, tokenizer, QUESTION, solutions, "right")
    assert_scores(found.score(QUESTION, solutions).probs, want)


def test_beginning_of_text_that_is_padding():
    """ReasonEval-7B pads with its beginning of text, which must stay where it begins one."""
    tokenizer, model = byte_level(pad="<s>"), parts("reasoneval")[1]
    found = prm.load(model, tokenizer, "reasoneval").score(QUESTION, SOLUTIONS[:1]).probs
    ids = tokenizer.encode(f"Question:\n{QUESTION}\nAnswer:\nLet's think step by step.\n")
    ends = []
    for step in SOLUTIONS[0]:
        ids += tokenizer.encode(step, add_special_tokens=False)
        ends.append(len(ids) - 1)
    (states,) = readers.forward(model.pretrained_model, [ids], "right", hidden=True)
    assert_scores(found, [(1 - model.score_head(states[ends]).softmax(-1)[:, 0]).tolist()])


def test_one_step_for_all():
    """ "Model" aggregation: a solution is one step, whose tag is behind it."""
    tokenizer, model, _ = parts("qwen")
    whole = prm.load(model, tokenizer, functools.partial(QwenPRM, whole=True))
    joined = [["\n".join(steps)] for steps in SOLUTIONS if steps]
    # The reader splits at blank lines: lines stand for them.
    found = whole.score(QUESTION, joined).probs
    assert_scores(found, published("qwen", joined))
    texts = ["\n\n".join(steps) for steps in SOLUTIONS if steps]
    assert_scores(
        whole.score(QUESTION, [steps for steps in SOLUTIONS if steps]).probs,
        [x.tolist() for x in whole.score(QUESTION, [[text] for text in texts]).probs],
    )


def test_reductions():
    scores = reward_model("trl").score(QUESTION, SOLUTIONS)
    for i, (margin, prob) in enumerate(zip(scores.margins, scores.probs, strict=True)):
        m, p = margin.double().numpy(), prob.double().numpy()
        assert margin.dtype == prob.dtype == scores.last.dtype == torch.float32
        if not len(m):
            assert all(getattr(scores, name)[i].isnan() for name in ("last", "prod", "sum"))
            continue
        weight = np.exp(-p / 0.1) / np.exp(-p / 0.1).sum()
        want = dict(
            last=p[-1], min=p.min(), max=p.max(), mean=p.mean(), sum=p.sum(), prod=p.prod(),
            gmean=p.prod() ** (1 / len(p)), sum_logit=m.sum(), softmin=(weight * p).sum(),
        )  # fmt: skip
        for name, value in want.items():
            assert getattr(scores, name)[i].item() == pytest.approx(value, rel=1e-5), name
    assert reward_model("pure").score(QUESTION, SOLUTIONS[:1]).prod.isnan()
    assert reward_model("pure").score(QUESTION, []).margins == []


@pytest.mark.parametrize("sign", [1, -1])
def test_saturated_margins_stay_apart(sign):
    """Margins of 20: 64 rollouts that no bfloat16 probability tells apart."""
    tokenizer, model = byte_level(), made(lambda: llama(LlamaForTokenClassification, num_labels=2))
    with torch.no_grad():
        model.score.weight.mul_(0.01)
        model.score.bias.copy_(torch.tensor([-10.0, 10.0]) * sign)
    loaded = prm.load(model.to(torch.bfloat16), tokenizer, "trl")
    found = loaded.score(QUESTION, [[f"{i} {step}"] for i in range(16) for step in STEPS[:4]])
    assert (found.sum_logit.abs() - 20).abs().max() < 2
    assert len(set(found.sum_logit.tolist())) == 64
    assert len(set((1 - found.last if sign < 0 else found.last).bfloat16().tolist())) == 1


def test_many_rollouts_in_bounded_memory():
    """What is held does not grow with the number of solutions, which come back in order."""
    model, done, held = reward_model("trl"), [], []
    grow = prm.PRMSession.grow

    def watched(session, wanted):
        grow(session, wanted)
        held.append(session.memory()["total"])

    solutions = [[f"{i % 97}", STEPS[i % 6]][: i % 3] for i in range(300)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prm.PRMSession, "grow", watched)
        with Counter(parts("trl")[1]) as seen:
            scores = model.score(QUESTION, solutions, batch=8, progress=done.append)
    assert sum(done) == 300 and max(done) == 8
    assert max(held) < 3 * held[len(held) // 2]
    some = [7, 100, 299]
    assert_scores([scores.probs[i] for i in some], published("trl", [solutions[i] for i in some]))
    prompt = len(byte_level().encode(QUESTION))
    assert seen.forwards[0] == prompt, "the question is encoded once"


def test_no_logits():
    """Neither the language-model head nor a classifier runs on hidden states of all tokens."""
    for family in ("openr", "qwen", "trl"):
        model = parts(family)[1]
        head = model.lm_head if family == "openr" else model.score
        hook = head.register_forward_hook(lambda *args: pytest.fail("the head was called"))
        reward_model(family).score(QUESTION, SOLUTIONS)
        hook.remove()


@pytest.mark.parametrize("family", CASES)
def test_family_is_told(family):
    tokenizer, model, reference = parts(family)
    names = {"math-shepherd": "peiyi9979/math-shepherd-mistral-7b-prm",
             "rlhflow": "RLHFlow/Llama3.1-8B-PRM-Deepseek-Data", "openr": "openreasoner/Math-psa",
             "versa": "UW-Madison-Lee-Lab/VersaPRM", "er-prm": "HanningZhang/Llama3.1-Math-PRM",
             "pure": "jinachris/PURE-PRM-7B", "implicit": "PRIME-RL/EurusPRM-Stage2"}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.config, "_name_or_path", names.get(family, ""))
        if family == "skywork":  # told from PQM by the tokenizer
            patch.setattr(tokenizer, "get_vocab", dict)
        found = prm.load(model, tokenizer, reference=reference)
    assert type(found.family) is prm.FAMILIES[family]


def changed(model, **found):
    """`model` with other entries in its config."""
    for name, value in found.items():
        setattr(model.config, name, value)
    return model


def wide_qwen():
    model = qwen(prm.Qwen2ForProcessRewardModel)
    model.score[2] = nn.Linear(SHAPE["hidden_size"], 3)
    return model


def adapted():
    model = headed(llama(LlamaModel), "v_head", 1)
    model.pretrained_model.merge_and_unload = None
    return model


def labels(n, kind=LlamaForTokenClassification):
    return lambda: llama(kind, num_labels=n)


turns = functools.partial(byte_level, None, template=TURNS)
split = functools.partial(byte_level, None, words=())
REFUSED = [
    ("er-prm", llama, split, "' ки' must be one token.*came with the PRM"),
    ("versa", llama, split, "must be one token"),
    ("openr", qwen, split, "must be one token"),
    ("math-shepherd", llama, split, "'ки' must be one token"),
    ("pqm", llama, lambda: byte_level(words=("ки",)), "no value head"),
    ("er-prm", lambda: LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": 264})), byte_level,
     "outside the model's vocabulary of 264"),
    ("trl", labels(3), byte_level, "with 2 outputs, it is Linear.*belong together"),
    ("prm800k", labels(2), byte_level, "with 3 outputs"),
    ("pure", labels(3), byte_level, "with 2 outputs"),
    ("qwen", wide_qwen, turns, "with 2 outputs"),
    ("skywork", lambda: headed(qwen(), "v_head", 2), byte_level, "with 1 outputs"),
    ("reasoneval", lambda: headed(llama(LlamaModel), "score_head", 2), byte_level,
     "with 3 outputs"),
    ("qwen", qwen, turns, "Qwen2ForCausalLM has no head of two"),
    ("auto", lambda: changed(qwen(), _name_or_path="Qwen/Qwen2.5-Math-PRM-7B"), turns,
     "kvtools.prm.Qwen2ForProcessRewardModel"),
    ("trl", labels(2, LlamaForSequenceClassification), byte_level,
     "LlamaForSequenceClassification is no token class"),
    ("rlhflow", labels(2), byte_level, "no language-model head.*AutoModelForCausalLM"),
    ("skywork", qwen, byte_level, "no value head.*from_pretrained"),
    ("reasoneval", llama, byte_level, "no score_head"),
    ("implicit", llama, turns, "pass reference="),
    ("rlhflow", llama, lambda: byte_level(template=None), "no chat template"),
    ("reasoneval", llama, lambda: byte_level(pad=None), "no padding token"),
    ("versa", lambda: changed(llama(), final_logit_softcapping=30.0), byte_level,
     "changes its logits .final_logit_softcapping"),
    ("pqm", adapted, byte_level, "merge it first"),
    ("auto", llama, byte_level, "cannot be told; name it: family= one of qwen, math-shep"),
    ("eurus", llama, byte_level, "'eurus' does not exist; expected qwen"),
    (functools.partial(PURE, separator=""), qwen, byte_level, "gives no token"),
]  # fmt: skip


@pytest.mark.parametrize("family,model,tokenizer,message", REFUSED)
def test_what_does_not_fit_is_refused_at_load(family, model, tokenizer, message):
    with pytest.raises(ValueError, match=message):
        prm.load(model(), tokenizer(), family)


TURN = "<|im_end|>\n<|im_start|>user\nIt is right.<|im_end|>\n"
ANSWER = "<|eot|><|im_start|>assistant<|im_end|>\n\n+<|eot|>"


@pytest.mark.parametrize("family", CASES)
def test_control_tokens_in_a_step_are_text(family):
    """What a step says moves no position, and is no turn, padding or tag."""
    made, tokenizer = reward_model(family).family, parts(family)[0]
    (plain,) = made.encode(QUESTION, [STEPS[:3]])
    controls = [i for i, x in tokenizer.added_tokens_decoder.items() if x.content != "<unk>"]
    for hostile in ("<s>", "<pad>", "<extra_0>", "[PRM]", TURN, ANSWER, "\U0010f000"):
        for step in (hostile, f"so {hostile} b", f"{hostile}{hostile} so"):
            (found,) = made.encode(QUESTION, [[STEPS[0], step, STEPS[2]]])
            assert len(found.reads) == 3
            for control in controls:
                assert found.ids.count(control) == plain.ids.count(control), (hostile, control)
            assert found.reads[0] == plain.reads[0]
            moved = len(found.ids) - len(plain.ids)
            assert found.reads[2][1] == plain.reads[2][1] + moved
            (asked,) = made.encode(f"{step} {QUESTION}", [STEPS[:3]])
            moved = len(asked.ids) - len(plain.ids)
            assert [(a - moved, b - moved) for a, b in asked.reads] == plain.reads
    steps = [STEPS[0], f"so {TURN}", STEPS[2]]
    session = reward_model(family).session(QUESTION, 1)
    for step in steps:
        session.append([step])
    whole = reward_model(family).score(QUESTION, [steps])
    assert_scores(session.margins, [x.tolist() for x in whole.margins])


@pytest.mark.parametrize("family,step", [
    ("math-shepherd", "so ки b"), ("math-shepherd", "so ки"), ("er-prm", "so ки b"),
    ("er-prm", "so ки"), ("openr", "so \n\n\n\n\n b"), ("versa", "so \n\n\n\nb"),
])  # fmt: skip
def test_a_step_that_would_be_read_for_a_tag_is_refused(family, step):
    model = reward_model(family)
    name = type(model.family).__name__
    with pytest.raises(ValueError, match=f"{name}: step 1 {re.escape(repr(step)[:5])}.*not hold"):
        model.score(QUESTION, [[STEPS[0], step]])
    session = model.session(QUESTION, 2)
    session.append([STEPS[0], STEPS[1]])
    with pytest.raises(ValueError, match=f"{name}: step 1"):
        session.append([None, step])
    assert [len(x) for x in session.margins] == [1, 1]
    with pytest.raises(ValueError, match=f"{name}: the question"):
        model.score(f"Is {step} right?", [[STEPS[0]]])


def test_a_tag_that_is_no_special_token_is_refused(monkeypatch):
    tokenizer = copy.deepcopy(turns())
    tokenizer.add_tokens(["<tag>"])
    monkeypatch.setattr(QwenPRM, "tag", "<tag>")
    made = QwenPRM(tokenizer)
    assert len(made.encode("Q", [["a", "<s>", "b"]])[0].reads) == 3
    with pytest.raises(ValueError, match="QwenPRM: step 1 'a<tag>b' holds '<tag>'"):
        made.encode("Q", [["a", "a<tag>b"]])


@pytest.mark.parametrize("family", ["math-shepherd", "er-prm"])
def test_a_tag_is_known_by_its_place(family):
    """Letters of the tag are letters, and a tag that a step lends does not stand for a lost one."""
    made = reward_model(family).family
    for steps in (["so носки", "киa", "b"], ["xки", "b"], ["кики", "b"], ["ки ки", "и"],
                  ["a", "киa ки b", "c"], ["a", "иa ки", "c"]):  # fmt: skip
        try:
            (found,) = made.encode(QUESTION, [steps])
        except ValueError as error:
            assert "must not hold it" in str(error)
            continue
        for k, (read, _) in enumerate(found.reads):
            begun = made.text(QUESTION, steps[: k + 1])
            ids = made.tokenize([begun], special=True)[0]
            assert found.ids[: read + 1] == ids


@pytest.mark.parametrize("step", ["im", "end", "m", "<|im_end|>", "assistant", "|", "user"])
def test_an_answer_that_the_template_says_too(step):
    made, tokenizer = reward_model("implicit").family, parts("implicit")[0]
    (found,) = made.encode("user or assistant, end", [[step]])
    ((begin, end),) = found.reads
    assert tokenizer.decode(found.ids[begin + 1 : end + 1]).strip("\n") in (
        step,
        f"{step}<|im_end|>",
    )
    assert "assistant\n" in tokenizer.decode(found.ids[: begin + 1])[-12:]


def test_steps_that_are_none():
    """A text where a list of steps is needed would be a step for each of its characters."""
    model = reward_model("trl")
    for solutions in (["It is 2."], "It is 2.", [STEPS, "So 2"], [None], [5], [[None]], [["a", 2]]):
        with pytest.raises(TypeError, match="list of|a step is a text"):
            model.score(QUESTION, solutions)
    with pytest.raises(TypeError, match=re.escape("split it: text.split('\\n\\n')")):
        model.score(QUESTION, ["It is 2."])
    for question in (None, 5, ["Q"]):
        for ask in (model.session, lambda question: model.score(question, [])):
            with pytest.raises(TypeError, match="a text is needed"):
                ask(question)
    session = model.session(QUESTION, 2)
    for steps in ("ab", [5, None], [["a"], None], [b"a", None]):
        with pytest.raises(TypeError, match="text"):
            session.append(steps)
    assert session.margins == [[], []]
    for how in (dict(rows=0), dict(rows=-1)):
        with pytest.raises(ValueError, match="rows="):
            model.session(QUESTION, **how)
    with pytest.raises(ValueError, match="batch=0"):
        model.score(QUESTION, [], batch=0)
    text = search.scorers.TextSession(lambda *_: [[0.5], [0.5]], QUESTION, 2)
    for steps in ("ab", [5, None], [["a"], None]):
        with pytest.raises(TypeError, match="text"):
            text.append(steps)
    with pytest.raises(TypeError, match="text"):
        text.extend(["a", "b"])


def save(folder, model, tokenizer, architecture=None, **tensors):
    """A checkpoint as it is published: code of its own, an architecture that nobody knows."""
    from safetensors.torch import load_file, save_file

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    found = json.loads(path.read_text())
    found |= {"architectures": [architecture or found["architectures"][0]]}
    if architecture:
        found["auto_map"] = {"AutoModel": f"modeling.{architecture}"}
    path.write_text(json.dumps(found))
    if tensors:
        weights = folder / "model.safetensors"
        save_file(load_file(weights) | {k.replace("__", "."): x for k, x in tensors.items()},
                  weights, {"format": "pt"})  # fmt: skip
    return str(folder)


@pytest.mark.parametrize("family", ["qwen", "skywork", "reasoneval", "trl", "rlhflow", "implicit"])
def test_checkpoint(family, tmp_path):
    tokenizer, model, reference = parts(family)
    inner = getattr(model, "pretrained_model", model)
    more, names = {}, {"qwen": "Qwen2ForProcessRewardModel", "skywork": "Qwen2ForPrmModel",
                       "reasoneval": "ReasonEval_7B"}  # fmt: skip
    if family == "skywork":
        more = {"v_head__summary__weight": model.v_head.summary.weight,
                "v_head__summary__bias": model.v_head.summary.bias}  # fmt: skip
    if family == "reasoneval":
        more = {"score_head__weight": model.score_head.weight,
                "score_head__bias": model.score_head.bias}  # fmt: skip
    folder = save(tmp_path / family, inner, tokenizer, names.get(family), **more)
    other = save(tmp_path / "reference", reference, tokenizer) if reference else None
    loaded = prm.from_pretrained(
        folder, "auto" if family in ("qwen", "reasoneval", "trl") else family, reference=other
    )
    assert_scores(
        loaded.score(QUESTION, SOLUTIONS).margins,
        [x.tolist() for x in reward_model(family).score(QUESTION, SOLUTIONS).margins],
    )


HEADS = {
    "qwen": ["score.0.weight", "score.2.bias"], "trl": ["score.weight", "score.bias"],
    "rlhflow": ["lm_head.weight"], "skywork": ["v_head.summary.weight", "model.norm.weight"],
    "reasoneval": ["score_head.weight", "layers.1.mlp.up_proj.weight"],
}  # fmt: skip


@pytest.mark.parametrize("family", HEADS)
def test_missing_weights_are_named(family, tmp_path):
    """Random ones would give other scores at each run."""
    from safetensors.torch import load_file, save_file

    tokenizer, model, _ = parts(family)
    more = {}
    if family in ("skywork", "reasoneval"):
        name = "v_head.summary" if family == "skywork" else "score_head"
        layer = model.get_submodule(name)
        more = {f"{name}.{x}".replace(".", "__"): getattr(layer, x) for x in ("weight", "bias")}
    kind = {"qwen": "Qwen2ForProcessRewardModel"}.get(family)
    folder = save(tmp_path, getattr(model, "pretrained_model", model), tokenizer, kind, **more)
    weights = tmp_path / "model.safetensors"
    whole = load_file(weights)
    for name in HEADS[family]:
        assert name in whole
        save_file({k: x for k, x in whole.items() if k != name}, weights, {"format": "pt"})
        with pytest.raises(ValueError, match=f"has .*{name.rpartition('.')[0]}"):
            prm.from_pretrained(folder, family)
    if family == "skywork":  # its language-model head is not read
        save_file({k: x for k, x in whole.items() if k != "lm_head.weight"}, weights)
        prm.from_pretrained(folder, family)
    if family == "trl":
        save_file(whole | {"score.weight": torch.zeros(3, 32)}, weights, {"format": "pt"})
        with pytest.raises(ValueError, match=r"score.weight \(3, 32\) for \(2, 32\)"):
            prm.from_pretrained(folder, family)


def test_tied_weights_are_not_missing(tmp_path):
    model = made(lambda: LlamaForCausalLM(LlamaConfig(**SHAPE | {"tie_word_embeddings": True})))
    folder = save(tmp_path, model, byte_level())
    found = prm.from_pretrained(folder, "rlhflow").score(QUESTION, SOLUTIONS[:1])
    want = prm.load(model, byte_level(), "rlhflow").score(QUESTION, SOLUTIONS[:1])
    assert_scores(found.margins, [x.tolist() for x in want.margins])


@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_code_of_a_checkpoint_is_refused_without_asking(what, tmp_path, monkeypatch):
    tokenizer, model, _ = parts("trl")
    folder, marker = save(tmp_path, model, tokenizer), tmp_path / "ran"
    (tmp_path / "mine.py").write_text(f"open({str(marker)!r}, 'w')\n")
    name = "config.json" if what == "model" else "tokenizer_config.json"
    path = tmp_path / name
    change = {
        "config.json": {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}},
        "tokenizer_config.json": {
            "tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}
        },
    }[name]  # fmt: skip
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    for read in (prm.from_pretrained, loading.load):
        with pytest.raises((ValueError, OSError), match="needs code that comes with it.*not run"):
            read(folder)
    assert not marker.exists()


class Tree:
    """What a session should hold, kept by hand: nodes are steps, rows are leaves."""

    def __init__(self, family, rows):
        self.encode = reward_model(family).family.encode
        self.nodes = [(None, [])]  # parent, steps from the root on
        self.rows, self.length = [0] * rows, 0
        empty, begun = (x.ids for x in self.encode(QUESTION, [[], ["0"]]))
        same = [x == y for x, y in zip(empty, begun, strict=False)]
        self.length = self.prompt = same.index(False) if False in same else len(same)

    def need(self, steps):
        """Tokens up to the last that is read."""
        if not steps:
            return self.prompt
        return self.encode(QUESTION, [steps])[0].reads[-1][1]

    def append(self, steps):
        made = {}
        for row, step in enumerate(steps):
            parent, text = self.rows[row], (step or "").strip()
            if not text:
                continue
            if (parent, text) not in made:
                path = self.nodes[parent][1]
                made[parent, text] = len(self.nodes)
                self.nodes.append((parent, [*path, text]))
                self.length += self.need([*path, text]) - self.need(path)
            self.rows[row] = made[parent, text]

    def crop(self, counts):
        for row, count in enumerate(counts):
            while len(self.nodes[self.rows[row]][1]) > count:
                self.rows[row] = self.nodes[self.rows[row]][0]

    def steps(self):
        return [self.nodes[node][1] for node in self.rows]


def play(session, tree, rng, moves):
    """Random appends, gathers, prunings, rewinds and looks ahead; yields after each."""
    serial = iter(range(10**6))

    def step():
        kind = rng.integers(5)
        return [None, " ", "Then", f"so {next(serial)}.", f"{next(serial)} + 7 is!"][kind]

    def append():
        steps = [step() for _ in range(session.rows)]
        margin, prob = session.append(steps)
        tree.append(steps)
        return margin, prob

    for _ in range(moves):
        match rng.choice(
            ["append", "gather", "prune", "crop", "look"], p=[0.5, 0.2, 0.1, 0.1, 0.1]
        ):
            case "append":
                append()
            case "gather":
                index = rng.integers(session.rows, size=rng.integers(1, 6))
                session.gather(index)
                tree.rows = [tree.rows[i] for i in index]
            case "prune":
                index = np.sort(rng.permutation(session.rows)[: rng.integers(1, session.rows + 1)])
                session.gather(index)
                tree.rows = [tree.rows[i] for i in index]
            case "crop":
                counts = [int(rng.integers(len(steps) + 1)) for steps in tree.steps()]
                session.crop(counts)
                tree.crop(counts)
            case "look":
                counts = [len(steps) for steps in tree.steps()]
                append()
                append()
                session.crop(counts)
                tree.crop(counts)
        yield


# Tokens of these merge with what comes next, and are encoded again.
MERGE = {"implicit"}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", CASES)
def test_growing_rows_score_as_whole_solutions(family, seed):
    """And no token is encoded twice, except the few that merge with what comes next."""
    model, rng = reward_model(family), np.random.default_rng(seed)
    with Counter(reward_model(family).backbones[0]) as seen:
        session = model.session(QUESTION, 3)
        tree = Tree(family, 3)
        for _ in play(session, tree, rng, 14):
            scored = sum(seen.forwards)
            assert session.tokens == scored
            if family in MERGE:
                assert tree.length - 1 <= scored <= tree.length + 2 * len(tree.nodes)
            else:
                assert scored == tree.length
            assert session.rows == len(tree.rows)
            assert [len(x) for x in session.margins] == [len(x) for x in tree.steps()]
    assert len(tree.nodes) > 5
    whole = model.score(QUESTION, tree.steps())
    assert_scores(session.margins, [x.tolist() for x in whole.margins])
    assert_scores(session.probs, [x.tolist() for x in whole.probs])
    want = published(family, tree.steps())
    assert_scores(session.margins if family == "implicit" else session.probs, want)
    margin, prob = session.append([None] * session.rows)
    for found, every in ((margin, session.margins), (prob, session.probs)):
        assert found.dtype == torch.float32
        last = [x[-1] if x else np.nan for x in every]
        torch.testing.assert_close(found, torch.tensor(last), equal_nan=True)


@pytest.mark.parametrize("seed", range(3))
def test_moving_tag(seed):
    """The tag behind the newest step is taken back before the next one."""
    tokenizer, model, _ = parts("qwen")
    whole = prm.load(model, tokenizer, functools.partial(QwenPRM, whole=True))
    session, tree = whole.session(QUESTION, 2), Tree("qwen", 2)
    with Counter(model) as seen:
        for _ in play(session, tree, np.random.default_rng(seed), 12):
            pass
    for steps, margins in zip(tree.steps(), session.margins, strict=True):
        begun = [steps[: k + 1] for k in range(len(steps))]
        want = [x.item() for x in whole.score(QUESTION, begun).last]
        torch.testing.assert_close(
            torch.tensor(margins).sigmoid(), torch.tensor(want), atol=1e-5, rtol=1e-5
        )
    # A step adds its tokens, a blank line and a tag.
    assert sum(seen.forwards) < 16 * len(tree.nodes)


class Letters:
    """The tokenizer of a policy with random weights, which says what steps are made of."""

    ALPHABET = sorted({*"".join(STEPS)})

    def encode(self, text):
        return [self.ALPHABET.index(x) for x in text if x in self.ALPHABET]

    def decode(self, tokens):
        return "".join(self.ALPHABET[token % len(self.ALPHABET)] for token in tokens)


@pytest.mark.parametrize("family", ["qwen", "math-shepherd", "skywork", "reasoneval"])
@pytest.mark.parametrize(
    "strategy",
    [
        functools.partial(search.beam, n=4, beam=2, lookahead=1),
        functools.partial(search.dvts, n=6, beam=3),
        functools.partial(search.particle_filter, n=6),
        functools.partial(search.particle_gibbs, n=3, iterations=2),
    ],
    ids=["beam", "dvts", "filter", "gibbs"],
)
def test_search_scores_as_whole_solutions(strategy, family):
    """Whatever was forked, dropped and taken back, by either cache."""
    model, questions = reward_model(family), [QUESTION, "And how many has Ann?"]
    steps = search.Steps(Letters(), [".", "!", "2"], step_tokens=8, tokens=24, depth=5)
    with Counter(model.backbones[0]) as seen:
        found = strategy(Rollouts(tiny_model()), questions, model, steps, seed=1)
    assert found.encoded == sum(seen.forwards)
    ends = set()
    for question, candidates in zip(questions, found.candidates, strict=True):
        bare = [[x[:-1] if x[-1] in ".!2" and x[:-1].strip() else x for x in c.steps]
                for c in candidates]  # fmt: skip
        want = model.score(question, bare)
        assert_scores([c.margins for c in candidates], [x.tolist() for x in want.margins])
        assert_scores([c.scores for c in candidates], [x.tolist() for x in want.probs])
        ends |= {len(x) for x in bare}
    assert len(ends) > 1 and max(ends) > 2


def test_merged_tokens_are_encoded_again():
    """A full stop and the blank line behind it are one token, which a step's end was not."""
    model = reward_model("implicit")
    session = model.session(QUESTION, 1)
    before = session.tokens
    session.append(["It is 12."])
    assert session.tokens > before
    first = session.margins
    session.append(["So 12."])
    both = model.score(QUESTION, [["It is 12.", "So 12."]]).margins[0]
    assert_scores(session.margins, [both.tolist()])
    assert abs(session.margins[0][0] - first[0][0]) > 1e-6, "the end of the first step changed"
    session.crop([1])
    assert session.margins == first, "and is back"
    session.append(["So 12."])
    assert_scores(session.margins, [both.tolist()])


@pytest.mark.parametrize("options", [
    dict(bits=8), dict(bits=4), dict(bits=4, budget=48), dict(bits=4, prompt_budget=24, recent=8),
], ids=str)  # fmt: skip
def test_compressed(options):
    """The store is that of rollouts: smaller, and scores stay close."""
    model = reward_model("trl")
    question = " ".join([QUESTION] * 3)
    exact = model.session(question, 8)
    packed = model.session(question, 8, CacheConfig(**options))
    for session in (exact, packed):
        for step in STEPS[:4]:
            session.append([f"{i} {step}" for i in range(8)])
        session.gather([0, 0, 3, 7, 5, 5, 5, 1])
        session.append([f"{STEPS[4]} {i}" for i in range(8)])
    assert packed.memory()["total"] < exact.memory()["total"]
    error = (torch.tensor(packed.probs) - torch.tensor(exact.probs)).abs().mean()
    assert 0 < error < (0.02 if options["bits"] == 8 else 0.2)


def test_equal_rows_are_encoded_once():
    session = reward_model("trl").session(QUESTION, 4)
    with Counter(parts("trl")[1]) as seen:
        session.append([STEPS[0]] * 3 + [STEPS[1]])
        session.gather([2, 1, 0, 3])
        session.append(["So 12", "So 12", "So 13", "So 12"])
    sizes = [len(byte_level().encode(x + "\n", add_special_tokens=False))
             for x in (STEPS[0], STEPS[1], "So 12", "So 13", "So 12")]  # fmt: skip
    assert sum(seen.forwards) <= sum(sizes) + 5
    assert session.margins[0] == session.margins[1] != session.margins[2]


@pytest.mark.parametrize("family", CASES)
def test_solutions_that_begin_alike_are_encoded_as_a_forest(family, monkeypatch):
    first, second, *_ = STEPS
    solutions = [
        [first, second], [first, second, "So 12"], [first, second, "So 13", "or 3"],
        [first, f"{second} now"], [first], [second, first], [first, second, "So 12"],
    ]  # fmt: skip
    model, encoded = reward_model(family), []
    for least in (10**6, 3):
        monkeypatch.setattr("kvtools.prm.session.STRETCH", least)
        with Counter(model.backbones[0]) as seen:
            found = model.score(QUESTION, solutions)
        encoded.append(sum(seen.forwards))
        assert_scores(scores_of(family, found), published(family, solutions))
    assert encoded[1] < 0.75 * encoded[0], encoded


def test_rows_are_alike_only_by_all_that_they_hold(monkeypatch):
    monkeypatch.setattr("kvtools.prm.session.STRETCH", 2)
    session = reward_model("trl").session(QUESTION, 3)
    session.append(["So 12", "So 13", "So 13"])
    session.append([f"{STEPS[0]} Right"] + [STEPS[0]] * 2)
    solutions = [["So 12", f"{STEPS[0]} Right"], *[["So 13", STEPS[0]]] * 2]
    assert_scores(session.probs, published("trl", solutions))


def test_equal_tokens_of_other_steps(monkeypatch):
    """ReasonEval's separators leave no trace: rows may have the same tokens and other steps."""
    tokenizer, model = metaspace("always"), parts("reasoneval")[1]
    session = prm.load(model, tokenizer, "reasoneval").session(QUESTION, 2)
    session.append(["he has 12", "he"])
    session.append([None, "has 12"])
    session.append(["coins", "coins"])
    assert [len(x) for x in session.margins] == [2, 3]
    assert session.margins[1][1:] == pytest.approx(session.margins[0], abs=1e-5)
    monkeypatch.setattr("kvtools.prm.session.STRETCH", 2)
    solutions = [["he has 12", "coins"], ["he", "has 12", "coins now"]]
    both = prm.load(model, tokenizer, "reasoneval").score(QUESTION, solutions).margins
    assert both[1][:2].tolist() == pytest.approx(session.margins[1][:2], abs=1e-5)
    assert both[0].tolist() == pytest.approx(session.margins[0], abs=1e-5)


def test_many_tokens_go_in_parts(monkeypatch):
    monkeypatch.setattr("kvtools.prm.session.TOKENS", 20)
    with Counter(reward_model("trl").backbones[0]) as seen:
        found = reward_model("trl").score(QUESTION, SOLUTIONS)
    assert len(seen.forwards) > 4
    assert_scores(found.probs, published("trl", SOLUTIONS))


def test_session_refuses():
    model = reward_model("trl")
    session = model.session(QUESTION, 2)
    session.append([STEPS[0], None])
    with pytest.raises(ValueError, match="steps has 1 entries; there are 2 rows"):
        session.append([STEPS[0]])
    for counts in ([2, 0], [0], [-1, 0]):
        with pytest.raises(ValueError, match="a number for each row, at most .1, 0."):
            session.crop(counts)
    with pytest.raises(IndexError, match="index holds 2"):
        session.gather([0, 2])
    assert session.rows == 2 and [len(x) for x in session.margins] == [1, 0]
    with pytest.raises(ValueError, match="load the PRM without them"):
        reward_model("trl", quirks=True).session(QUESTION)
    with pytest.raises(ValueError, match="gives no token"):
        reward_model("pure").session("", 1)


@pytest.mark.parametrize("family", ["trl", "implicit"])
def test_a_forward_that_fails_can_be_taken_again(family):
    """Also where the reference model's fails and the policy's has gone on."""
    model = reward_model(family)
    session = model.session(QUESTION, 2)
    session.append(STEPS[:2])
    before, failing = session.margins, [True]

    def fails(module, args):
        if failing:
            raise RuntimeError("mine")

    hook = model.backbones[-1].layers[1].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="mine"):
        session.append([STEPS[2], None])
    assert session.margins == before
    failing.clear()
    session.append([STEPS[2], STEPS[3]])
    hook.remove()
    solutions = [[STEPS[0], STEPS[2]], [STEPS[1], STEPS[3]]]
    want = model.score(QUESTION, solutions).margins
    assert_scores(session.margins, [x.tolist() for x in want])


def test_bench():
    """The benchmark on a tiny model: rivals agree, targets are judged, and it must not rot."""
    scale = bench.Scale(rollouts=3, steps=4, rounds=1)
    result = bench.run(made(llama), byte_level(), scale, Console(quiet=True))
    rows = result["rows"]
    assert set(rows) == set(bench.RIVALS)
    assert all(row["seconds"] > 0 for row in rows.values())
    assert rows["re-encoded"]["tokens"] > 2 * rows["session"]["tokens"]
    assert rows["session"]["tokens"] < rows["full logits once"]["tokens"]
    spent = result["step_scores"]
    assert 0 < spent["allocated"] <= spent["gathered"]
    assert [target["ok"] for target in bench.targets(result)][2]
    slow = rows | {"session": {"tokens": 10**6, "seconds": 10.0**6}}
    judged = bench.targets(result | {"rows": slow})
    assert [target["ok"] for target in judged] == [False, False, True]


def test_a_rival_that_scores_something_else_is_not_measured(monkeypatch):
    monkeypatch.setitem(
        bench.RIVALS, "full logits once", lambda case, progress: (torch.zeros(()), 1)
    )
    with pytest.raises(AssertionError, match="full logits once differs from re-encoded"):
        bench.run(made(llama), byte_level(), bench.Scale(3, 2, 1), Console(quiet=True))


def test_heads_that_hold_no_matrix():
    """Layers that packages have quantised are asked themselves."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 16, generator=rng)
    plain = torch.nn.Linear(16, 11)
    packed = torch.nn.Module()
    packed.forward, packed.weight = plain.forward, plain.weight.detach().to(torch.uint8)
    read, target = torch.tensor([1, 4, 8]), torch.tensor([3, 0, 10])
    for make, several in (
        (lambda x: StepHead(x, [7, 2], sign=-1), 1), (lambda x: StepHead(x, [3, 1, 9]), 1),
        (lambda x: TokenHead(x, 5), 1), (lambda x: LogRatio(x, plain, 0.5), 2),
        (lambda x: LogRatio(plain, x, 0.5), 2),
    ):  # fmt: skip
        with torch.no_grad():
            found, want = (make(x)([hidden, hidden + 1][:several], read, target)
                           for x in (packed, plain))  # fmt: skip
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
