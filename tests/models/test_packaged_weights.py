"""The trained weights themselves: small, whole, trained, described."""

import math

import pytest
import torch

from nested_learning import pretrained
from nested_learning.models import preset
from nested_learning.models.packaged import SUMS, packaged_folder, packaged_names

NAMES = ("hope-small", "transformer-small")
MOST_BYTES = 12e6
# Written for this test, in the manner of what they were trained on.
TEXT = '''
class Queue:
    """A queue that several threads may use.

    Items are returned in the order in which they were added.
    """

    def __init__(self, maxsize=0):
        self.maxsize = maxsize
        self._items = []

    def put(self, item):
        """Add an item to the end of the queue."""
        if self.maxsize and len(self._items) >= self.maxsize:
            raise ValueError("the queue is full")
        self._items.append(item)

    def __len__(self):
        return len(self._items)
'''


def test_the_package_has_them():
    assert tuple(packaged_names()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_files_are_small_and_told_of(name):
    folder = packaged_folder(name)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MOST_BYTES
    assert {path.name for path in folder.iterdir()} >= {"README.md", "config.json", "model.safetensors", SUMS}
    card = (folder / "README.md").read_text(encoding="utf-8")
    for part in ("nested-learning train", f"nested-learning score {name}", "Licence", "bits per byte"):
        assert part in card


@pytest.mark.parametrize("name", NAMES)
def test_they_are_trained(name):
    model, tokenizer = pretrained(name)
    ids = tokenizer(TEXT, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert tokenizer.decode(ids[0]) == TEXT
    bits = loss * (ids.shape[1] - 1) / math.log(2) / len(TEXT.encode())
    assert bits < 1.8  # 3.6 before training
    own = {
        "dtype",
        "pad_token_id",
        "auto_map",
        "architectures",
    }  # by saving, by the tokenizer
    saved, named = model.config.to_diff_dict(), preset(name).to_diff_dict()
    assert {key: saved[key] for key in saved if key not in own} == {
        key: named[key] for key in named if key not in own
    }


def test_both_have_the_same_size():
    hope, transformer = (pretrained(name).model.num_parameters() for name in NAMES)
    assert transformer == pytest.approx(hope, rel=0.01)


def test_hope_goes_on_in_a_state_of_fixed_size():
    model, tokenizer = pretrained("hope-small")
    ids = tokenizer(TEXT * 3, return_tensors="pt", add_special_tokens=False).input_ids[:, :390]
    assert ids.shape[1] == 390  # both pieces end within a chunk, where the state is largest
    with torch.no_grad():
        whole = model(ids).logits
        cache = model(ids[:, :130], use_cache=True).past_key_values
        size = cache.nbytes()
        rest = model(ids[:, 130:], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(rest.logits, whole[:, 130:], rtol=1e-3, atol=1e-3)
    assert rest.past_key_values.nbytes() == size
