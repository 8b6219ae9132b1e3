"""The whole graph away from the demo's comfort: another family, storage on a real S3 server."""

import json
from pathlib import Path

import pytest
import torch
from btx_trainer.model import new_model, save_model
from s3_server import BUCKET
from transformers import AutoModelForCausalLM, MistralConfig
from workspace import Workspace


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The demo's data, with a Mistral for a seed: a sliding window and an odd rope base."""
    workspace = Workspace.with_inputs(tmp_path_factory.mktemp("inputs") / "w")
    init = workspace.folder / "build/demo/init"
    given = json.loads((init / "config.json").read_text())
    names = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "num_hidden_layers")
    config = MistralConfig(
        **{name: given[name] for name in names},
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        head_dim=24, sliding_window=48, max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 12_345.0},
    )  # fmt: skip
    save_model(new_model(config, seed=1), init, torch.float32)
    return workspace


def test_a_mistral_run_on_s3_ends_in_a_model_that_stock_code_loads(
    inputs: Workspace, s3_endpoint: str, tmp_path: Path
) -> None:
    """Run, hits on a second machine's empty folder, export, load."""
    workspace = inputs.copy(tmp_path / "w")
    storage = {
        "uri": f"s3://{BUCKET}/mistral", "endpoint": s3_endpoint, "region": "us-east-1",
        "pathStyle": True,
    }  # fmt: skip
    manifest = workspace.manifest(storage=storage, tasks=True)

    workspace.btx("run", manifest)
    (workspace.folder / ".btx").rename(workspace.folder / "elsewhere")
    workspace.btx("run", manifest)
    workspace.btx("export", "tiny", "model")

    assert set(workspace.attempts().values()) == {0}
    model, info = AutoModelForCausalLM.from_pretrained(
        workspace.folder / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.model_type == "mixtral"
    assert model.config.sliding_window == 48
    assert model.config.rope_parameters["rope_theta"] == 12_345.0
    assert model.config.head_dim == 24
