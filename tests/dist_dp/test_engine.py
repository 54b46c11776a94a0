"""Three lines make a model and a DataLoader private; release is the only way out."""

from __future__ import annotations

import base64
import copy
import errno
import gc
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchrec import KeyedJaggedTensor

from dist_dp.accountant import LocalAccountant
from dist_dp.checkpoint import save_checkpoint
from dist_dp.engine import PrivacyEngine
from dist_dp.errors import BudgetError, ConfigError, DistDpError, ModelError, ReleaseError
from dist_dp.ledger import Ledger
from dist_dp.release_files import HashedFile
from dist_dp.released import Release, load_release
from tests.dist_dp.placement import RECORDS, model, records

DATA = records()
LOSSES = nn.functional.binary_cross_entropy_with_logits
DELTA = 1e-3


class Rows(Dataset[int]):
    def __len__(self) -> int:
        return RECORDS

    def __getitem__(self, index: int) -> int:
        return index


def data_loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(Rows(), batch_size=10, collate_fn=DATA.select, **options)


def engine(tmp_path: Path, **options: Any) -> PrivacyEngine:
    given: dict[str, Any] = {"dataset": "clicks", "ledger": tmp_path / "ledger.sqlite"}
    return PrivacyEngine(**given | options)


def train(
    made: PrivacyEngine, module: nn.Module | None = None, most: int = 10**6, **options: Any
) -> tuple[nn.Module, Any, Any]:
    module = module or model(meta=False)
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(module.parameters(), lr=0.1)
    settings: dict[str, Any] = {
        "target_epsilon": 4.0,
        "target_delta": DELTA,
        "max_grad_norm": 1.0,
        "epochs": 2,
        **options,
    }
    module, private_optimizer, loader = made.make_private_with_epsilon(
        module=module, optimizer=optimizer, data_loader=data_loader(), **settings
    )
    for batch in loader:
        loss = LOSSES(module(*batch.inputs), batch.labels)
        loss.backward()
        private_optimizer.step()
        private_optimizer.zero_grad()
        if made.parts.mechanism.schedule.step == most:
            break
    return module, private_optimizer, loader


def ledger(tmp_path: Path) -> LocalAccountant:
    return LocalAccountant(Ledger(tmp_path / "ledger.sqlite"))


def test_nothing_follows_a_step_that_failed(tmp_path: Path) -> None:
    """A record whose gradient is not finite must not decide that its batch is left out."""
    module = model(meta=False)
    made = engine(tmp_path)
    module, optimizer, loader = made.make_private_with_epsilon(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=data_loader(),
        target_epsilon=4.0,
        target_delta=DELTA,
        max_grad_norm=1.0,
        epochs=2,
    )
    batches = iter(loader)
    for number in range(2):
        batch = next(batches)
        loss = LOSSES(module(*batch.inputs), batch.labels)
        (loss * float("nan") if number else loss).backward()
        if number:
            with pytest.raises(ModelError, match="not finite"):
                optimizer.step()
            optimizer.zero_grad()
        else:
            optimizer.step()
    with pytest.raises(DistDpError, match="step 2 failed"):
        made.release(tmp_path / "release")
    assert not (tmp_path / "release").exists()
    with pytest.raises(DistDpError, match="step 2 failed"):
        save_checkpoint(made, tmp_path / "checkpoints")
    with pytest.raises(DistDpError, match="step 2 failed"):
        next(batches)


def test_three_lines_and_a_release(tmp_path: Path) -> None:
    fresh = model(meta=False)
    made = engine(tmp_path)
    private, _, loader = train(made, copy.deepcopy(fresh))
    assert len(loader) == loader.steps_drawn == 8
    folder = made.release(tmp_path / "released")
    private.eval()
    with torch.no_grad():
        wanted = private(*DATA.inputs)
        loaded = load_release(folder, copy.deepcopy(fresh)).eval()
        torch.testing.assert_close(loaded(*DATA.inputs), wanted)
        assert not torch.allclose(fresh(*DATA.inputs), wanted)
    privacy = Release.open(folder).manifest["privacy"]
    assert privacy["private"] and privacy["steps"] == 8 and privacy["delta"] == DELTA
    assert 3.9 < privacy["epsilon"] <= 4.0
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    for words in ("ε", "one record", "adding or removing", "not** cover", f"δ | {DELTA:g}"):
        assert words in card
    # The ledger holds at least what the card says.
    spend = ledger(tmp_path).spent("clicks")
    assert sum(spend.steps_by_event.values()) == 8
    assert privacy["epsilon"] <= spend.epsilon * (1 + 1e-9) <= 4.0 * (1 + 1e-9)


def test_a_run_that_ends_early_pays_for_its_steps_alone(tmp_path: Path) -> None:
    made = engine(tmp_path)
    train(made, most=3)
    gc.collect()
    assert sum(ledger(tmp_path).spent("clicks").steps_by_event.values()) == 3
    privacy = Release.open(made.release(tmp_path / "released")).manifest["privacy"]
    assert privacy["steps"] == 3 and 0 < privacy["epsilon"] < 4.0


def test_runs_of_one_data_set_share_its_budget(tmp_path: Path) -> None:
    train(engine(tmp_path))
    spent = ledger(tmp_path).spent("clicks")
    with pytest.raises(BudgetError, match="'clicks'"):
        train(engine(tmp_path))
    assert ledger(tmp_path).spent("clicks").steps_by_event == spent.steps_by_event
    train(PrivacyEngine(dataset="others", ledger=tmp_path / "ledger.sqlite"))


def test_the_secret_stays_inside(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    made = engine(tmp_path)
    private, optimizer, loader = train(made)
    made.release(tmp_path / "released")
    secret = made._secret
    assert secret is not None
    keys = [secret, *(s.noise_key for s in made.parts.shards), optimizer._dense_key]
    captured = capfd.readouterr()
    texts = [captured.out, captured.err, caplog.text, repr(made), repr(made.parts)]
    texts += [repr(optimizer), repr(loader), repr(private), repr(made.parts.shards)]
    found = [t.encode() for t in texts]
    found += [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    assert len(found) > 12
    for key in keys:
        forms = (key, key.hex().encode(), base64.b64encode(key), repr(key).encode())
        assert not any(form in content for form in forms for content in found)
    assert engine(tmp_path)._agree_on_secret() != secret


def test_a_given_secret_is_marked(tmp_path: Path) -> None:
    made = engine(tmp_path, secret=bytes(32))
    train(made)
    folder = made.release(tmp_path / "released")
    privacy = Release.open(folder).manifest["privacy"]
    assert not privacy["private"] and privacy["fixed_secret"]
    for text in (privacy["statement"], (folder / "MODEL_CARD.md").read_text(encoding="utf-8")):
        assert "not private" in text and "fixed secret" in text


def test_without_privacy(tmp_path: Path) -> None:
    made = engine(tmp_path, mechanism="none")
    module = model(meta=False)
    optimizer = torch.optim.Adagrad(module.parameters(), lr=0.1)
    _, _, loader = made.make_private(
        module=module,
        optimizer=optimizer,
        data_loader=data_loader(),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        steps=2,
    )
    for batch in loader:
        LOSSES(module(*batch.inputs), batch.labels).backward()
        made.parts.optimizer.step()
    privacy = Release.open(made.release(tmp_path / "released")).manifest["privacy"]
    assert not privacy["private"] and privacy["epsilon"] is None
    assert "not private" in privacy["statement"]


class Counting(nn.Module):
    """Keeps a running mean of what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model(meta=False)
        self.register_buffer("running_mean", torch.zeros(()))

    def forward(self, dense: Tensor, *sparse: KeyedJaggedTensor) -> Tensor:
        if self.training:
            self.running_mean.mul_(0.9).add_(0.1 * dense.detach().mean())
        return self.inner(dense, *sparse)


def test_a_moving_statistic_cannot_be_released(tmp_path: Path) -> None:
    made = engine(tmp_path)
    train(made, Counting())
    with pytest.raises(ModelError, match=r"'running_mean'.*without noise"):
        made.release(tmp_path / "released")
    assert not [p for p in tmp_path.iterdir() if "released" in p.name]


def test_what_stands_in_the_way_of_a_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine(tmp_path)
    with pytest.raises(DistDpError, match="make_private"):
        made.release(tmp_path / "released")
    train(made)
    (tmp_path / "taken").mkdir()
    with pytest.raises(ReleaseError, match=r"'.*taken' exists"):
        made.release(tmp_path / "taken")
    assert not list((tmp_path / "taken").iterdir())

    def full(self: Any, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "part.arrow")

    with monkeypatch.context() as patch:
        patch.setattr(HashedFile, "write", full)
        with pytest.raises(ReleaseError, match=r"disk is full.*Nothing was kept"):
            made.release(tmp_path / "released")
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"taken"}
    made.release(tmp_path / "released")


def test_what_is_no_release(tmp_path: Path) -> None:
    made = engine(tmp_path)
    train(made)
    folder = made.release(tmp_path / "released")
    fresh = model(meta=False)
    with pytest.raises(ReleaseError, match=r"no release\.json"):
        Release.open(tmp_path)
    with pytest.raises(ReleaseError, match="does not fit the model"):
        load_release(folder, nn.Linear(2, 2))
    part = next((folder / "tables").rglob("*.arrow"))
    content = part.read_bytes()
    part.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    with pytest.raises(ReleaseError, match=r"arrow' was changed since the release"):
        load_release(folder, fresh)
    part.unlink()
    with pytest.raises(ReleaseError, match="lacks tables/"):
        load_release(folder, fresh)
    part.write_bytes(content)
    load_release(folder, fresh)
    manifest = json.loads((folder / "release.json").read_text())
    manifest["files"]["../outside"] = {"bytes": 0, "sha256": "0"}
    (folder / "release.json").write_text(json.dumps(manifest))
    with pytest.raises(ReleaseError, match="out of its folder"):
        load_release(folder, fresh)
    (folder / "release.json").write_text("{")
    with pytest.raises(ReleaseError, match="damaged"):
        load_release(folder, fresh)
    (folder / "checkpoint.json").write_text("{}")
    with pytest.raises(ReleaseError, match=r"training checkpoint.*not settled.*secret"):
        load_release(folder, fresh)


def test_an_unsettled_row_is_not_released(tmp_path: Path) -> None:
    """Every row of the release moved, looked up or not."""
    fresh = model(meta=False)
    made = engine(tmp_path)
    train(made, copy.deepcopy(fresh), most=1)
    assert any(bool((s.last_step < 1).any()) for s in made.parts.shards)
    release = Release.open(made.release(tmp_path / "released"))
    for name, start in (
        ("pooled.a", fresh.pooled.embedding_bags["a"].weight),
        ("sequence.s", fresh.sequence.embeddings["s"].weight),
    ):
        assert bool((release.table(name) != start).all())


REFUSED: dict[str, tuple[dict[str, Any], type[DistDpError], str]] = {
    "nesterov": ({"nesterov": True}, ConfigError, "(?i)nesterov"),
    "epochs and steps": ({"steps": 4}, ConfigError, "either epochs or steps"),
    "epsilon": ({"target_epsilon": 0.0}, ConfigError, "epsilon"),
    "delta": ({"target_delta": 0.5}, ConfigError, "delta"),
    "batch": ({"expected_batch_size": RECORDS + 1}, ConfigError, "expected_batch_size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_charged(tmp_path: Path, case: str) -> None:
    options, kind, words = REFUSED[case]
    module = model(meta=False)
    options = dict(options)
    nesterov = bool(options.pop("nesterov", False))
    optimizer = torch.optim.SGD(
        module.parameters(), lr=0.1, momentum=0.9 * nesterov, nesterov=nesterov
    )
    with pytest.raises(kind, match=words):
        train(engine(tmp_path), module, optimizer=optimizer, **options)
    assert not ledger(tmp_path).datasets()


def test_adagrad_is_refused(tmp_path: Path) -> None:
    module = model(meta=False)
    with pytest.raises(ConfigError, match=r"'lazydp'.*'adagrad'.*Use sgd for the tables"):
        train(engine(tmp_path), module, optimizer=torch.optim.Adagrad(module.parameters()))
