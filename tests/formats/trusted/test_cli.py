"""``--trust`` on the command line."""

from __future__ import annotations

import json

import numpy as np
import torch

from backdoorscan.cli import run


def test_evaluate(net, source, tmp_path, capsys):
    images = np.random.default_rng(0).random((200, 8, 8, 3)).astype(np.float32)
    with torch.no_grad():
        labels = net(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()).argmax(1).numpy()
    np.savez(tmp_path / "clean.npz", images=images, labels=labels)
    torch.save(net, tmp_path / "m.pt")
    command = ["evaluate", str(tmp_path / "m.pt"), "--valid", str(tmp_path / "clean.npz"), "-f", "json"]
    command += ["--arch", f"{source}:Net", "--input-range", "0,1"]
    assert run(command) == 2
    assert "--trust" in capsys.readouterr().err
    assert run([*command, "--trust"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["clean_accuracy"] > 0.95
    assert report["model"]["trusted"] is True and report["model"]["converted_from"] == "pickle"
