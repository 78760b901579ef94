"""Locks: each keeps out those that ask for the same, and who waits for the device holds nothing on it."""

from __future__ import annotations

from contextlib import contextmanager
from threading import Event, Thread

from personalize_core.workspace import store as stores
from personalize_core.workspace.store import OWN_DEVICE, Store


def test_a_cell_is_locked_and_none_whose_names_run_together_to_the_same(tmp_path):
    store = Store(tmp_path)
    with store.alone("dreambooth@a-b", "x"):
        assert store.is_under_way("dreambooth@a-b", "x")
        assert not store.is_under_way("dreambooth@a", "b-x")
        with store.alone("dreambooth@a", "b-x"):
            assert store.is_under_way("dreambooth@a", "b-x")
    assert not store.is_under_way("dreambooth@a-b", "x")


def test_who_waits_for_the_device_has_its_base_model_aside_until_it_is_free(tmp_path, monkeypatch):
    monkeypatch.delenv(OWN_DEVICE, raising=False)
    waiting, happened = Event(), []

    @contextmanager
    def aside():
        happened.append("aside")
        waiting.set()
        yield
        happened.append("back")

    def compute():
        with Store(tmp_path).device():
            happened.append("computed")

    monkeypatch.setattr(stores, "aside", aside)
    with Store(tmp_path).device():
        assert happened == []  # nobody was waited for
        other = Thread(target=compute)
        other.start()
        assert waiting.wait(60)
        assert happened == ["aside"]
    other.join(60)
    assert happened == ["aside", "back", "computed"]
