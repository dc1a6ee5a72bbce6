"""What was read, and read on: copies leave each other alone, and nothing is forgotten."""

import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache

from rag2.generator.past import Past, shares_past
from rag2.generator.room import ROOM
from small_models import CONFIGS, build, small_tokenizer


@pytest.mark.parametrize("name", CONFIGS)
def test_copies_that_are_read_on_token_by_token_leave_each_other_alone(
    name: str, tmp_path, dice: random.Random, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("rag2.generator.room.ROOM", dice.randint(1, 4))
    model = build(name, tmp_path, small_tokenizer()).double()
    assert shares_past(model)
    rows = [[dice.randrange(3, 300) for _ in range(dice.randint(2, 9))] for _ in range(3)]
    with torch.no_grad():
        _, past = Past.nothing(model, len(rows)).read(model, rows)
        live = [(past, rows)]
        for _ in range(40):
            at = dice.randrange(len(live))
            past, rows = live[at]
            if len(live) < 4 and dice.random() < 0.3:
                some = [dice.randrange(len(rows)) for _ in range(dice.randint(1, 3))]
                copied = past.take(torch.tensor(some))
                live.append((dice.choice([copied, copied.trimmed()]), [rows[i] for i in some]))
                continue
            more = [[dice.randrange(3, 300)] for _ in rows]
            logits_RV, past = past.read(model, more)
            rows = [row + new for row, new in zip(rows, more, strict=True)]
            live[at] = (past, rows)
            for logits_V, row in zip(logits_RV, rows, strict=True):
                whole_V = model(input_ids=torch.tensor([row])).logits[0, -1]
                torch.testing.assert_close(logits_V, whole_V, atol=1e-9, rtol=1e-9)


def test_tokens_that_come_one_at_a_time_are_written_into_room_that_is_there(
    tmp_path, dice: random.Random
):
    model = build("llama", tmp_path, small_tokenizer())
    with torch.no_grad():
        pasts = [Past.nothing(model, 1).read(model, [ids])[1] for ids in ([5, 6, 7], [8, 9])]
        past = Past.joined(pasts)
        places = [past.cache.layers[0].keys.data_ptr()]  # pyright: ignore
        for _ in range(3 * ROOM):
            _, past = past.read(model, [[dice.randrange(3, 300)] for _ in range(2)])
            places.append(past.cache.layers[0].keys.data_ptr())  # pyright: ignore
    assert len(set(places[: ROOM + 1])) == 1 and len(set(places)) == 3


def test_rows_are_taken_on_the_device_where_they_are():
    index_R = torch.tensor([1, 0, 1])
    with FakeTensorMode(allow_non_fake_inputs=True):
        cache = DynamicCache()
        states = torch.zeros(2, 3, 4, 5, device="cuda")
        cache.update(states, states, 0)
        past = Past(cache, torch.ones(2, 4, device="cuda")).take(index_R)
        assert past.mask_RP.device.type == "cuda" and len(past) == 3
