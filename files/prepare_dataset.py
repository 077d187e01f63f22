#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Mix conversations into ``train.jsonl`` and ``eval.jsonl``, and prove that the target renders every row.

Rows are ``{id, conversations: [{role, content}]}``, SpecForge's contract. With ``regenerate`` the
assistant turns of the training rows are written anew by the target, greedily: a draft learns best
what the target itself would say.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
from collections.abc import Iterator
from typing import Any

import torch
from chat_format import REFUSALS, ChatFormat
from spec_decode import conversations
from spec_decode.errors import SpecDecodeError
from spec_decode.files import read_json_object, sha256_file, sha256_value, write_json, write_text
from spec_decode.program import PhaseResult, run
from spec_decode.progress import Progress


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target-model-path", required=True)
    parser.add_argument("--method", choices=("eagle3", "dflash"), required=True)
    parser.add_argument("--chat-template", required=True)
    parser.add_argument("--chat-template-file", default="")
    parser.add_argument("--config", required=True, help="JSON: sources, train, eval, seed, max_length, regenerate")
    parser.add_argument("--output", required=True, help="folder for train.jsonl, eval.jsonl and manifest.json")
    parser.add_argument("--result", required=True)
    return parser.parse_args()


class Selection:
    """Rows that the target renders, split so that no prompt of eval is a prompt of train."""

    def __init__(self, chat: ChatFormat, method: str, config: dict[str, Any]) -> None:
        self._chat, self._method, self._config = chat, method, config
        self.dropped: collections.Counter[str] = collections.Counter()

    def choose(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Training and evaluation rows in the shares that the sources' weights ask for."""
        config = self._config
        weights = [float(source.get("weight", 1)) for source in config["sources"]]
        shares = {part: conversations.shares(config[part], weights) for part in ("train", "eval")}
        train: list[dict[str, Any]] = []
        held_out: list[dict[str, Any]] = []
        prompts: dict[str, set[str]] = {"train": set(), "eval": set()}
        for number, source in enumerate(config["sources"]):
            rows = list(conversations.read(source["path"], source.get("layout", "auto")))
            random.Random(f"{config['seed']}-{number}").shuffle(rows)
            wanted = {part: sum(shares[part][: number + 1]) for part in ("train", "eval")}
            dropped: dict[str, list[str]] = collections.defaultdict(list)
            for row in self._usable(rows, source["path"], dropped):
                if len(train) >= wanted["train"] and len(held_out) >= wanted["eval"]:
                    break
                prompt = conversations.prompt_key(row)
                if len(held_out) < wanted["eval"]:
                    # Rows passed over here repeat a prompt that is held out already, or one of training.
                    if prompt not in prompts["eval"] and prompt not in prompts["train"]:
                        prompts["eval"].add(prompt)
                        held_out.append(row)
                elif prompt not in prompts["eval"]:
                    prompts["train"].add(prompt)
                    train.append(row)
            unusable = {reason: len(ids) for reason, ids in dropped.items()}
            self.dropped.update(unusable)
            facts = f"{source['path']} has {len(rows)} rows, of which {sum(unusable.values())} cannot be used"
            self._check_share(facts, number, shares, train, held_out)
        random.Random(config["seed"]).shuffle(train)
        return train, held_out

    def _usable(self, rows: list[dict[str, Any]], path: str, dropped: dict[str, list[str]]) -> Iterator[dict[str, Any]]:
        """Rows of one source that can be used; the ids of the others go into ``dropped``, by the reason."""
        limit = float(self._config["max_dropped_fraction"])
        for seen, row in enumerate(rows, 1):
            reason = self._fault(row)
            if reason is None:
                yield row
                continue
            dropped[reason].append(row["id"])
            count = sum(map(len, dropped.values()))
            if seen >= 20 and count > limit * seen and count >= 5:
                counts = ", ".join(f"{len(ids)} {reason} (first: row {ids[0]})" for reason, ids in dropped.items())
                raise SpecDecodeError(
                    f"Of the first {seen} rows of {path} too many cannot be used: {counts}.",
                    "Mend the data or the chat template, or raise spec_max_dropped_fraction.",
                )

    def _fault(self, row: dict[str, Any]) -> str | None:
        if "fault" in row:
            return str(row["fault"])
        turns = row["conversations"]
        if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in turns):
            return "without an assistant turn"
        try:
            rendered = self._chat.render(turns)
        except REFUSALS as error:
            return f"not rendered by the chat template ({type(error).__name__})"
        if not rendered.trains(self._method):
            mask = "a loss mask without two tokens side by side" if rendered.loss_mask.any() else "an empty loss mask"
            return f"with {mask} under the template (at {self._chat.max_length} tokens)"
        return None

    @staticmethod
    def _check_share(facts: str, number: int, shares: dict[str, list[int]], train: list[Any], held_out: list[Any]) -> None:
        for part, chosen in (("train", train), ("eval", held_out)):
            wanted = sum(shares[part][: number + 1])
            if len(chosen) < wanted:
                raise SpecDecodeError(
                    f"The data set lacks {wanted - len(chosen)} {part} rows: {facts}, and its share of {part} is"
                    f" {shares[part][number]}.",
                    "Give more data, or lower spec_train_rows or spec_eval_rows.",
                )


class Regenerator:
    """Lets the target write the assistant turns, in batches of like length, greedily."""

    def __init__(self, chat: ChatFormat, target: str, config: dict[str, Any], cache: str, progress: Progress) -> None:
        self._chat, self._target, self._config = chat, target, config
        self._cache, self._progress = cache, progress

    def rewrite(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows with the target's own words; what an earlier, interrupted call wrote is taken from its cache."""
        # Known by what they say: the row of that number may say something else today.
        contents = {sha256_value(row["conversations"]): row["conversations"] for row in rows}
        done = self._read_cache()
        missing = {key: turns for key, turns in contents.items() if key not in done}
        if missing:
            self._generate(missing, done, len(contents))
        return [{"id": row["id"], "conversations": done[sha256_value(row["conversations"])]} for row in rows]

    def _read_cache(self) -> dict[str, list[dict[str, str]]]:
        done: dict[str, list[dict[str, str]]] = {}
        if os.path.exists(self._cache):
            with open(self._cache, encoding="utf-8") as stream:
                for line in stream:
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError:
                        break  # the line that was being written when the job was killed
                    done[row["key"]] = row["conversations"]
        return done

    def _generate(self, missing: dict[str, list[dict[str, str]]], done: dict[str, Any], total: int) -> None:
        from transformers import AutoModelForCausalLM

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(self._target, dtype=torch.bfloat16).to(device).eval()
        os.makedirs(os.path.dirname(self._cache), exist_ok=True)
        write_text(self._cache, "".join(_line({"key": key, "conversations": turns}) for key, turns in done.items()))
        keys = sorted(missing, key=lambda key: sum(len(turn["content"]) for turn in missing[key]))
        size = int(self._config["regenerate_batch_size"])
        with open(self._cache, "a", encoding="utf-8") as stream:
            for start in range(0, len(keys), size):
                batch = keys[start : start + size]
                for key, turns in zip(batch, self._answer(model, [missing[key] for key in batch])):
                    done[key] = turns
                    stream.write(_line({"key": key, "conversations": turns}))
                stream.flush()
                self._progress.update(f"{len(done)}/{total} rows rewritten by the target", len(done), total)

    def _answer(self, model: Any, batch: list[list[dict[str, str]]]) -> list[list[dict[str, str]]]:
        written: list[list[dict[str, str]]] = [[] for _turns in batch]
        for position in range(max(len(turns) for turns in batch)):
            asked = []
            for index, turns in enumerate(batch):
                if position >= len(turns):
                    continue
                turn = turns[position]
                if turn["role"] == "assistant":
                    asked.append(index)
                else:
                    written[index].append(dict(turn))
            if asked:
                for index, text in zip(asked, self._complete(model, [written[index] for index in asked])):
                    written[index].append({"role": "assistant", "content": text})
        return written

    def _complete(self, model: Any, prompts: list[list[dict[str, str]]]) -> list[str]:
        tokenizer = self._chat.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        encoded = tokenizer.pad({"input_ids": [self._chat.prompt_ids(turns) for turns in prompts]}, return_tensors="pt")
        encoded = encoded.to(model.device)
        with torch.inference_mode():
            output = model.generate(**encoded, do_sample=False, max_new_tokens=int(self._config["max_new_tokens"]))
        answers = output[:, encoded["input_ids"].shape[1] :]
        return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def evidence(
    chat: ChatFormat, method: str, train: list[dict[str, Any]], held_out: list[dict[str, Any]], config: dict[str, Any]
) -> dict[str, Any]:
    """The figures that the data set gate judges, counted on the rows as they were written."""
    counts = collections.Counter[str]()
    span = ""
    for row in train + held_out:
        try:
            rendered = chat.render(row["conversations"])
        except REFUSALS:
            counts["rows_failed"] += 1
            continue
        counts["rows_rendered"] += 1
        counts["tokens"] += len(rendered.input_ids)
        counts["supervised_tokens"] += int(rendered.loss_mask.sum())
        counts["empty_masks"] += not rendered.trains(method)
        counts["mask_outside_assistant"] += not chat.covers_only_assistant(row["conversations"], rendered)
        span = span or chat.supervised_text(rendered)
    prompts = {conversations.prompt_key(row) for row in train}
    names = ("rows_rendered", "rows_failed", "empty_masks", "mask_outside_assistant", "tokens", "supervised_tokens")
    return {
        "counts": {"train": len(train), "eval": len(held_out)},
        "expected": {"train": config["train"], "eval": config["eval"]},
        **{name: counts[name] for name in names},
        "overlap_train_eval": sum(conversations.prompt_key(row) in prompts for row in held_out),
        "supervised_span": span,
    }


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def main() -> None:
    options = arguments()
    result = PhaseResult("dataset", options.result)
    progress = Progress()
    config = read_json_object(options.config, "data set configuration")
    chat = ChatFormat(options.target_model_path, options.chat_template, options.chat_template_file, int(config["max_length"]))
    progress.update("reading and rendering the sources")
    selection = Selection(chat, options.method, config)
    train, held_out = selection.choose()
    if config["regenerate"]:
        work = sha256_value([[row["conversations"] for row in train], config, os.environ.get("TARGET_SHA", "")])[:12]
        cache = os.path.join(options.output, "regenerated", f"{work}.jsonl")
        train = Regenerator(chat, options.target_model_path, config, cache, progress).rewrite(train)
    facts = evidence(chat, options.method, train, held_out, config)
    for part, rows in (("train", train), ("eval", held_out)):
        write_text(os.path.join(options.output, f"{part}.jsonl"), "".join(_line(row) for row in rows))
    files = {part: sha256_file(os.path.join(options.output, f"{part}.jsonl")) for part in ("train", "eval")}
    write_json(os.path.join(options.output, "manifest.json"), {"sha256": files, "counts": facts["counts"]})
    result.complete(
        {
            **facts,
            "rows_without_assistant": selection.dropped["without an assistant turn"],
            "rows_dropped": dict(selection.dropped),
            "regenerated": bool(config["regenerate"]),
            "mean_tokens": round(facts["tokens"] / max(1, facts["rows_rendered"]), 1),
            "sources": config["sources"],
            "template_sha256": chat.template_sha,
        }
    )


if __name__ == "__main__":
    run(main)
