from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from salience.errors import InputError
from salience.evidence import Run


def test_draws_repeat_for_a_seed_and_differ_between_seeds_and_uses(tmp_path: Path) -> None:
    run = Run(11, scratch=tmp_path)
    first = run.rng().random(4)
    assert np.array_equal(first, Run(11, scratch=tmp_path).rng().random(4))
    assert not np.array_equal(first, run.rng("control").random(4))
    assert not np.array_equal(first, Run(12, scratch=tmp_path).rng().random(4))


def test_torch_draws_follow_the_seed_and_leave_the_global_generator_alone(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_rng_state()
    first = torch.rand(4, generator=Run(11, scratch=tmp_path).generator())
    assert torch.equal(first, torch.rand(4, generator=Run(11, scratch=tmp_path).generator()))
    assert not torch.equal(first, torch.rand(4, generator=Run(12, scratch=tmp_path).generator()))
    assert torch.equal(before, torch.get_rng_state())


def test_more_replicates_keep_the_first(tmp_path: Path) -> None:
    run = Run(11, scratch=tmp_path)
    seeds = run.replicate_seeds(20)
    assert run.replicate_seeds(5) == seeds[:5]
    assert len(set(seeds)) == 20
    assert seeds != Run(12, scratch=tmp_path).replicate_seeds(20)
    with pytest.raises(InputError, match="0"):
        run.replicate_seeds(0)


def test_smoke_progress_and_bad_values(tmp_path: Path) -> None:
    said: list[str] = []
    run = Run(11, "smoke", scratch=tmp_path, progress=said.append)
    run.step("fits")
    assert run.smoke and said == ["fits"]
    Run(11, scratch=tmp_path).step("unheard")
    with pytest.raises(InputError, match="'smoke', 'desk', 'full'"):
        Run(11, "tiny", scratch=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="-1"):
        Run(-1, scratch=tmp_path)
