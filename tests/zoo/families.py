"""All families of the zoo."""

from __future__ import annotations

from tests.zoo.dense import DENSE
from tests.zoo.hybrids import HYBRIDS
from tests.zoo.mixtures import MIXTURES
from tests.zoo.multimodal import MULTIMODAL
from tests.zoo.sizes import Family

FAMILIES: dict[str, Family] = {family.name: family for family in [*DENSE, *MIXTURES, *MULTIMODAL, *HYBRIDS]}
