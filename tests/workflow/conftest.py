"""What several modules of whole runs share."""

import pytest
import transformers

from tests.conftest import TINY
from tests.workflow.test_end_to_end import Workspace


@pytest.fixture(scope="session")
def studied(tmp_path_factory) -> Workspace:
    """A tiny model for the studies, with as many layers as it takes to meet a budget in bytes by whole ranks of clusters."""
    place = Workspace(tmp_path_factory.mktemp("studies"))
    class_name, options = TINY["llama"]
    cls = getattr(transformers, class_name)
    cls(cls.config_class(**{**options, "num_hidden_layers": 8})).save_pretrained(place.folder / "model")
    return place
