"""Best of 16 by a process reward model: python best_of_n.py POLICY PRM "QUESTION"."""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from kvtools import CacheConfig, Rollouts, prm, search


def main(
    policy: str, reward: str, question: str, n: int = 16, tokens: int = 512
) -> search.Candidate | None:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    scorer = prm.from_pretrained(reward)

    def prompt(text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

    steps = search.Steps(tokenizer, delimiters=["\n\n"], tokens=tokens, prompt=prompt)
    rollouts = Rollouts(model, CacheConfig.preset("balanced"), temperature=0.8)
    found = search.best_of_n(rollouts, [question], scorer, steps, n=n)
    for candidate in sorted(found.candidates[0], key=lambda c: -c.score("min")):
        print(f"{candidate.score('min'):.3f}  {candidate.text[:70]!r}")
    (best,) = found.best("max", reduce="min")
    print(f"{found.generated} tokens generated, {found.encoded} encoded by the reward model")
    return best


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("policy", "reward", "question"):
        parser.add_argument(name)
    print(main(**vars(parser.parse_args())).text)
