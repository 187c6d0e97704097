"""Published readers of process reward models, transcribed: full logits, whole solutions, padding.

Each takes a model, a tokenizer, a question, the steps of each solution and the side of the padding,
and returns the scores of each solution. Texts are put together as the readers' authors do it.
"""

import torch


@torch.no_grad()
def forward(model, rows, side, hidden=False):
    """Logits (or final hidden states) of each row, from one padded batch."""
    if not rows:
        return []
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    spans = [slice(0, len(row)) if side == "right" else slice(width - len(row), width)
             for row in rows]  # fmt: skip
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        ids[i, span], mask[i, span] = torch.tensor(row), 1
    position = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=position,
                output_hidden_states=hidden)  # fmt: skip
    found = out.hidden_states[-1] if hidden else out.logits
    return [x[span] for x, span in zip(found, spans, strict=True)]


def encode(tokenizer, texts, special=True):
    return [tokenizer.encode(text, add_special_tokens=special) for text in texts]


def at(ids, logits, tag, columns, pick=0):
    """Probability of one of a few tokens, wherever the tag is."""
    probs = logits[:, columns].softmax(-1)[:, pick]
    return probs[torch.tensor(ids) == tag].tolist()


def qwen(model, tokenizer, question, solutions, side):
    """search-and-learn: answers are texts, split at blank lines."""
    system = "Please reason step by step, and put your final answer within \\boxed{}."
    tag = tokenizer.encode("<extra_0>")[0]
    texts = []
    for steps in solutions:
        answer = "\n\n".join(steps)
        messages = [
            {"role": "system", "content": system}, {"role": "user", "content": question},
            {"role": "assistant", "content": answer.replace("\n\n", "<extra_0>") + "<extra_0>"},
        ]  # fmt: skip
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
    rows, scores = encode(tokenizer, texts), []
    for ids, logits in zip(rows, forward(model, rows, side), strict=True):
        probs = logits.softmax(-1) * (torch.tensor(ids) == tag)[:, None]
        scores.append(probs[probs != 0].view(-1, 2)[:, 1].tolist())
    return scores


def math_shepherd(model, tokenizer, question, solutions, side):
    """The model card."""
    columns = tokenizer.encode("+ -", add_special_tokens=False)
    tag = tokenizer.encode("ки")[-1]
    rows = encode(tokenizer, [question + " " + "\n".join(s + " ки" for s in x) for x in solutions])
    logits = forward(model, rows, side)
    return [at(ids, x, tag, columns) for ids, x in zip(rows, logits, strict=True)]


def math_shepherd_search(model, tokenizer, question, solutions, side):
    """search-and-learn, with an empty system prompt."""
    columns = tokenizer.encode("+ -", add_special_tokens=False)
    tag = tokenizer.encode("ки")[-1]
    answers = ["\n\n".join(steps).replace("\n\n", " ки\n\n") for steps in solutions]
    answers = [x if x[-2:] == "\n\n" else x + " ки" for x in answers]
    rows = encode(tokenizer, [f"\n{question}\n {answer}" for answer in answers])
    logits = forward(model, rows, side)
    return [at(ids, x, tag, columns) for ids, x in zip(rows, logits, strict=True)]


def rlhflow(model, tokenizer, question, solutions, side):
    """One forward per step, over a conversation that grows."""
    columns = [tokenizer.encode(x)[-1] for x in "+-"]
    scores = []
    for steps in solutions:
        conversation, texts = [], []
        for k, step in enumerate(steps):
            text = question + " " + step if k == 0 else step
            conversation += [{"role": "user", "content": text},
                             {"role": "assistant", "content": "+"}]  # fmt: skip
            texts.append(tokenizer.apply_chat_template(conversation, tokenize=False))
        found = forward(model, encode(tokenizer, texts, special=False), side)
        scores.append([x[-3, columns].softmax(-1)[0].item() for x in found])
    return scores


def rlhflow_search(model, tokenizer, question, solutions, side):
    """search-and-learn: answers are texts; a twin conversation tells where the "+" are."""
    columns = [tokenizer.encode(x)[-1] for x in "+-"]
    mark = tokenizer.encode("ки")[1]
    rows, twins = [], []
    for steps in solutions:
        texts = []
        for said in ("+", "ки"):
            conversation = []
            for k, part in enumerate("\n\n".join(steps).split("\n\n")):
                text = question + " " + part if k == 0 else part
                conversation += [{"role": "user", "content": text},
                                 {"role": "assistant", "content": said}]  # fmt: skip
            texts.append(tokenizer.apply_chat_template(conversation, tokenize=False))
        row, twin = encode(tokenizer, texts, special=False)
        assert len(row) == len(twin)
        rows.append(row)
        twins.append(twin)
    return [x[:, columns].softmax(-1)[:-1, 0][torch.tensor(twin)[1:] == mark].tolist()
            for x, twin in zip(forward(model, rows, side), twins, strict=True)]  # fmt: skip


def skywork(model, tokenizer, question, solutions, side):
    """Lines are steps."""
    newline = tokenizer.encode("\n")[-1]
    rows, flags = [], []
    for steps in solutions:
        ids = tokenizer.encode(tokenizer.bos_token + question + "\n", add_special_tokens=False)
        flag = [False] * len(ids)
        for line in "\n".join(steps).split("\n"):
            piece = tokenizer.encode(line, add_special_tokens=False) if line else []
            ids += [*piece, newline]
            flag += [False] * len(piece) + [True]
        rows.append(ids)
        flags.append(flag)
    value = model.v_head.summary
    hidden = forward(model.pretrained_model, rows, side, hidden=True)
    return [value(x).squeeze(-1).sigmoid()[torch.tensor(flag)].tolist()
            for x, flag in zip(hidden, flags, strict=True)]  # fmt: skip


def openr(model, tokenizer, question, solutions, side):
    good, bad = (tokenizer.encode(x, add_special_tokens=False)[0] for x in (" +", " -"))
    tag = tokenizer.encode(" \n\n\n\n\n", add_special_tokens=False)[0]
    rows = encode(
        tokenizer, [f"{question} " + "".join(f"{s} \n\n\n\n\n" for s in x) for x in solutions]
    )
    logits = forward(model, rows, side)
    return [at(ids, x, tag, [good, bad]) for ids, x in zip(rows, logits, strict=True)]


def versa(model, tokenizer, question, solutions, side):
    bad, good = (tokenizer.encode(x, add_special_tokens=False)[0] for x in "-+")
    tag = tokenizer.encode(" \n\n\n\n", add_special_tokens=False)[0]
    rows = encode(
        tokenizer, [f"{question} \n\n" + " \n\n\n\n".join(x) + " \n\n\n\n" for x in solutions]
    )
    logits = forward(model, rows, side)
    return [at(ids, x, tag, [bad, good], pick=1) for ids, x in zip(rows, logits, strict=True)]


def er_prm(model, tokenizer, question, solutions, side):
    """As other readers of the model do it: "+" against "-"."""
    columns = [tokenizer.encode(x, add_special_tokens=False)[-1] for x in (" +", " -")]
    tag = tokenizer.encode(" ки", add_special_tokens=False)[-1]
    rows = encode(tokenizer, [f"{question} " + "".join(s + " ки" for s in x) for x in solutions])
    logits = forward(model, rows, side)
    return [at(ids, x, tag, columns) for ids, x in zip(rows, logits, strict=True)]


def er_prm_authors(model, tokenizer, question, solutions, side):
    """Softmax over the vocabulary; what is behind a tag is on a line of its own, joined up."""
    good = tokenizer.encode(" +")[-1]
    tag = tokenizer.encode(" ки")[-1]
    texts = [question + "".join(s + " ки\n" for s in x).replace(" ки\n", " ки") for x in solutions]
    rows = encode(tokenizer, texts)
    return [x.softmax(-1)[torch.tensor(ids) == tag, good].tolist()
            for ids, x in zip(rows, forward(model, rows, side), strict=True)]  # fmt: skip


def pqm(model, tokenizer, question, solutions, side):
    tag = tokenizer.convert_tokens_to_ids("[PRM]")
    prompt = (
        "Below is an instruction that describes a task.\n"
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{question}\n\n### Response: Let's think step by step"
    )
    texts = [prompt + "\n" + " [PRM]\n".join(steps) + " [PRM]" for steps in solutions]
    rows = encode(tokenizer, texts, special=False)
    value = model.v_head.summary
    hidden = forward(model.pretrained_model, rows, side, hidden=True)
    return [value(x).squeeze(-1)[torch.tensor(ids) == tag].tolist()
            for ids, x in zip(rows, hidden, strict=True)]  # fmt: skip


def pieces(model, tokenizer, question, solutions, side, bos, score):
    """Question and steps tokenised alone; `score` of the probabilities at each separator."""
    separator = tokenizer.encode("\n", add_special_tokens=False)
    rows, ends = [], []
    for steps in solutions:
        ids = [tokenizer.bos_token_id] if bos else []
        ids = ids + tokenizer.encode(question, add_special_tokens=False)
        found = []
        for step in steps:
            ids = ids + tokenizer.encode(step, add_special_tokens=False) + separator
            found.append(len(ids) - 1)
        rows.append(ids)
        ends.append(found)
    logits = forward(model, rows, side)
    return [score(x[found].softmax(-1)).tolist() for x, found in zip(logits, ends, strict=True)]


def trl(*args):
    return pieces(*args, bos=True, score=lambda p: p[:, 1])


def prm800k(*args):
    return pieces(*args, bos=True, score=lambda p: p[:, 1] + p[:, 2])


def pure(*args):
    return pieces(*args, bos=False, score=lambda p: p[:, 1] - p[:, 0])


def reasoneval(model, tokenizer, question, solutions, side, score=lambda p: p[:, 1] + p[:, 2]):
    """The separators are taken out of the tokens again."""
    separator, rows, ends = tokenizer.pad_token, [], []
    prompt = f"Question:\n{question}\nAnswer:\nLet's think step by step.\n"
    for steps in solutions:
        ids = tokenizer.encode(prompt + separator + "".join(step + separator for step in steps))
        marks = [i for i, x in enumerate(ids) if x == tokenizer.pad_token_id]
        rows.append([x for x in ids if x != tokenizer.pad_token_id])
        ends.append([i - 1 - k for k, i in enumerate(marks)][1:])
    states = forward(model.pretrained_model, rows, side, hidden=True)
    return [score(model.score_head(x[found]).softmax(-1)).tolist()
            for x, found in zip(states, ends, strict=True)]  # fmt: skip


def redundancy(*args):
    return reasoneval(*args, score=lambda p: p[:, 1])


def _log_ratios(model, reference, rows, side):
    """Of each token but a row's first."""

    def logprobs(x):
        return [logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0]
                for ids, logits in zip(rows, forward(x, rows, side), strict=True)]  # fmt: skip

    return [a - b for a, b in zip(logprobs(model), logprobs(reference), strict=True)]


def _conversation(tokenizer, question, steps):
    messages = [{"role": "user", "content": question},
                {"role": "assistant", "content": "\n\n".join(steps)}]  # fmt: skip
    return tokenizer.apply_chat_template(messages, tokenize=False)


def implicit_card(model, tokenizer, question, solutions, side, reference, coef=0.001):
    """EurusPRM's model card: sums from the beginning of the answer."""
    rows = encode(tokenizer, [_conversation(tokenizer, question, x) for x in solutions], False)
    scores = []
    for steps, ids, ratio in zip(
        solutions, rows, _log_ratios(model, reference, rows, side), strict=True
    ):
        last = []
        for k in range(len(steps) + 1):
            text = _conversation(tokenizer, question, steps[:k]).strip()
            text += "\n\n" if k not in (0, len(steps)) else ""
            last.append(len(tokenizer.encode(text, add_special_tokens=False)) - 2)
        mask = torch.tensor([0] * last[0] + [1] * (len(ids) - last[0]))[1:]
        sums = (coef * ratio * mask).cumsum(0)
        scores.append(sums[last[1:]].tolist())
    return scores


def implicit(model, tokenizer, question, solutions, side, reference, coef=0.001):
    """What a step itself says: its tokens, found by decoding ever longer beginnings."""
    rows = encode(tokenizer, [_conversation(tokenizer, question, x) for x in solutions], False)
    scores = []
    for steps, ids, ratio in zip(
        solutions, rows, _log_ratios(model, reference, rows, side), strict=True
    ):
        text = _conversation(tokenizer, question, steps)
        start = text.index("\n\n".join(steps))
        ends = [start]
        for k in range(len(steps)):
            ends.append(start + len("\n\n".join(steps[: k + 1])))
        begins = [len(tokenizer.decode(ids[:i])) for i in range(len(ids))]
        step = [sum(begin >= end for end in ends) for begin in begins]
        scores.append([
            coef * sum(ratio[i - 1].item() for i in range(1, len(ids)) if step[i] == k)
            for k in range(1, len(steps) + 1)
        ])  # fmt: skip
    return scores
