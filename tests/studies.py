"""Study files for tests."""

from pathlib import Path

import yaml

TINY = {
    "batch_size": 16,
    "warmup_steps": 0,
    "ema_rates": [0.5],
    "log_every": 2,
    "checkpoint_every": 4,
    "sample_count": 4,
    "sample_steps": 4,
    "model": {"channel_mult": [1], "num_res_blocks": 1, "attention_resolutions": []},
    "diffusion": {"timesteps": 20},
}
EVALUATE = {"metrics": "nll,fid", "exact": True, "images": 4, "features": "trained", "samples": 16, "steps": 5}


def study_file(folder: Path, train: dict | None = None, **fields: object) -> Path:
    content = {"name": "s", "values": [32, 64], "budgets": [1e10, 2e10], "evaluate": EVALUATE, "out": str(folder / "s")}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content | fields | {"train": TINY | (train or {})}))
    return path
