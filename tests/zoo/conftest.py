"""A checkpoint of each family, made when it is first asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.zoo.checkpoints import Specimen, save_specimen
from tests.zoo.families import FAMILIES


def _select(family_name: str) -> object:
    family = FAMILIES[family_name]
    marks = [pytest.mark.xdist_group(family_name)]
    if not family.is_fast:
        marks.append(pytest.mark.zoo)
    if not family.is_known:
        marks.append(pytest.mark.skip(f"this transformers has no {family.class_name}"))
    return pytest.param(family_name, marks=marks)


@pytest.fixture(scope="module", params=list(map(_select, FAMILIES)))
def specimen(request, tmp_path_factory) -> Iterator[Specimen]:
    """A random checkpoint of each family in turn; tests must not change it."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield save_specimen(FAMILIES[request.param], tmp_path_factory.mktemp("model"))
    torch.set_num_threads(num_threads)


@pytest.fixture
def working(specimen: Specimen) -> Specimen:
    """One of a family that is not refused."""
    if specimen.error is not None:
        pytest.skip("such models are refused")
    return specimen
