"""An OpenAI-compatible endpoint (section `judge` of params.yaml) as a judge of pairs: a critique and a verdict as JSON.

A call that failed is missing. An answer that came and cannot be read has no verdict: it is wrong and counted as invalid.
"""

from __future__ import annotations

import json
import logging
import time

from rmnlhf import grm
from rmnlhf.grm import Judgement
from rmnlhf.judge import Judge, Unreadable

from .runner import MISSING

log = logging.getLogger(__name__)
SCHEMA = {
    "type": "object", "required": ["critique", "verdict"], "additionalProperties": False,
    "properties": {"critique": {"type": "string"}, "verdict": {"enum": ["A", "B"]}},
}  # fmt: skip
TASK = "Which response is better? Give the decisive reasons in `critique`, and your choice, A or B, in `verdict`."


class Asker(Judge):
    """A `Judge` that keeps an answer which cannot be read as {"error": reason, "text": it}, and with each answer what it cost."""

    def __init__(self, params):
        super().__init__(params)
        self._replies = {}  # of the calls under way

    async def _create(self, client, messages, schema):
        reply = self._replies[id(messages)] = await super()._create(client, messages, schema)
        return reply

    async def _call(self, client, messages, schema, validator):
        began = time.perf_counter()
        try:
            answer, model = await super()._call(client, messages, schema, validator)
        except Unreadable as e:
            answer, model = {"error": str(e), "text": self._replies[id(messages)].choices[0].message.content}, None
        finally:
            reply = self._replies.pop(id(messages), None)
        tokens = getattr(getattr(reply, "usage", None), "completion_tokens", None)
        return {**answer, "tokens": tokens, "seconds": round(time.perf_counter() - began, 4)}, model

    def _ask_vllm(self, todo, schema, found, reasons):
        super()._ask_vllm(todo, schema, found, reasons)
        for key in [k for k, why in reasons.items() if not why.startswith("longer than")]:  # that one was not asked
            found[key] = json.dumps({"answer": {"error": reasons.pop(key)}})
            self.cache.set(key, found[key])


def answers(asked: list[tuple], params) -> list[dict]:
    """One answer, as `runner.evaluate` takes them, per (pair, order)."""
    prompts = []
    for pair, order in asked:
        system, turn = grm.build_prompt(pair, swap=order == "ba")
        prompts.append([system, turn | {"content": turn["content"].removesuffix(grm.TASK) + TASK}])
    asker, out = Asker(params.judge), []
    for said in asker.ask(prompts, SCHEMA):
        said = said or {"error": MISSING}
        judgement = Judgement(said.get("critique"), said.get("verdict"), said.get("error"))
        out.append({"judgement": judgement, "text": said.get("text", judgement.critique), "tokens": said.get("tokens"),
                    "seconds": said.get("seconds"), "votes": None})  # fmt: skip
    log.info("%s", asker.summary())
    return out
