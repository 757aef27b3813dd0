from __future__ import annotations

import pytest
from pydantic import ValidationError

from plans.plan import LoadoutEntry, TokenRules

RULES = {"ttft_s": 0.5, "tpot_s": 0.05, "prefill_tokens": (8, 16), "prefill_s": (0.1, 0.1)}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"ttft_s": 0}, "greater than 0"),
        ({"prefill_s": (0.1,)}, "one prefill_s for each of 2"),
        ({"prefill_tokens": (8, 8)}, "rising"),
        ({"prefill_tokens": (0, 8)}, "above 0"),
        ({"prefill_s": (0.2, 0.1)}, "never falling"),
        ({"prefill_s": (0.1, float("inf"))}, "finite"),
        ({"max_prefill_tokens": 0}, "greater than or equal to 1"),
    ],
)
def test_rules_that_contradict_themselves_are_refused(wrong, said):
    assert TokenRules(**RULES).prefill_tokens == (8.0, 16.0)
    with pytest.raises(ValidationError, match=said):
        TokenRules(**(RULES | wrong))


def test_an_entry_without_tokens_is_written_as_before_there_were_any():
    """So the digest of a plan that runs already does not change."""
    entry = LoadoutEntry(
        service="a",
        variant="m",
        max_batch=1,
        rate_rps=1,
        memory_bytes=(1,),
        deadline_s=1,
        stage_latency_s=((0.1,),),
    )
    assert "tokens" not in entry.model_dump(mode="json")
    chat = entry.model_copy(update={"tokens": TokenRules(**RULES)})
    assert LoadoutEntry.model_validate_json(chat.model_dump_json()) == chat
