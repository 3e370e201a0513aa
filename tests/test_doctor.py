"""The doctor: facts about the machine, the models and single files."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from trees import volume_

from knife import __version__, doctor, ops
from knife.checkpoint import describe, digest, save
from knife.devices import keep_freed_memory
from knife.errors import InputError, ModelError, OpsError
from knife.tasks import Plugin


@pytest.fixture
def shipped(models, monkeypatch):
    monkeypatch.setattr(doctor, "STARTER", models)


def test_it_names_what_matters(shipped):
    facts = doctor.examine()
    assert facts["knife"] == __version__
    assert facts["torch"].startswith(torch.__version__)
    status = ops.status("cpu")
    assert facts["ops on cpu"].startswith(f"{status.path} ({status.reason}); self-test: differs by ")
    assert facts["memory"] == keep_freed_memory()
    assert facts["graphs"].startswith("off")
    assert "regress (knife-diffusion" in facts["plugins"]
    assert facts["write here"].startswith("yes")
    assert facts["shipped models"].startswith("brain/classify, brain/diffusion, brain/regress, brain/segment, photo/")
    assert facts["healthy"] is True
    assert json.loads(json.dumps(facts)) == facts


def test_required_ops_that_cannot_be_had_are_an_illness_with_a_reason(shipped, monkeypatch):
    def refuse(device):
        raise OpsError("KNIFE_OPS=native, but there is no compiler")

    monkeypatch.setattr(ops, "status", refuse)
    facts = doctor.examine()
    assert facts["ops on cpu"] == "KNIFE_OPS=native, but there is no compiler"
    assert facts["healthy"] is False


def test_ops_that_fail_their_self_test_are_an_illness(shipped, monkeypatch):
    def fail(device):
        raise OpsError("the kernel differs from plain torch by 1")

    monkeypatch.setattr(ops, "self_test", fail)
    facts = doctor.examine()
    assert facts["ops on cpu"] == "the kernel differs from plain torch by 1"
    assert facts["healthy"] is False


def test_it_says_why_there_is_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert doctor.examine()["compiler"].startswith("none: no compiler for cpu found (looked for no-such-compiler")


def test_a_broken_plugin_is_named_and_no_illness(shipped, monkeypatch):
    rows = [*doctor.plugins(), Plugin("odd", (), "odd-dist", "1.0", "ImportError: no module")]
    monkeypatch.setattr(doctor, "plugins", lambda: rows)
    facts = doctor.examine()
    assert "odd (odd-dist 1.0): ImportError: no module" in facts["plugins"]
    assert facts["healthy"] is True


def test_without_a_usable_task_it_is_ill(shipped, monkeypatch):
    monkeypatch.setattr(doctor, "plugins", list)
    facts = doctor.examine()
    assert (facts["plugins"], facts["healthy"]) == ("none", False)


def test_a_damaged_shipped_model_is_an_illness(models, monkeypatch, tmp_path):
    starter = shutil.copytree(models, tmp_path / "starter")
    (starter / "brain" / "regress.safetensors").write_bytes(b"damaged")
    monkeypatch.setattr(doctor, "STARTER", starter)
    facts = doctor.examine()
    assert "regress.safetensors" in facts["broken models"]
    assert facts["healthy"] is False


def test_a_folder_that_cannot_be_written_to(tmp_path):
    assert doctor.writable(tmp_path / "nowhere") == "no: No such file or directory"


def test_models_are_listed_with_the_shipped_ones_behind(models, monkeypatch, tmp_path):
    own = tmp_path / "models"
    shutil.copytree(models / "photo", own / "mine")
    monkeypatch.setattr(doctor, "STARTER", models)
    (own / "mine" / "classify.safetensors").write_bytes(b"damaged")
    rows, unreadable = doctor.model_rows(own)
    assert [(row["dataset"], row["kind"]) for row in rows[:3]] == [
        ("mine", kind) for kind in ("diffusion", "regress", "segment")
    ]
    assert len(rows) == 3 + 8
    assert rows[0] == {
        "dataset": "mine", "kind": "diffusion", "judge": False, "channels": ["r", "g", "b"], "size": [16, 16],
        "learnt": "", "steps": 7, "path": str(own / "mine" / "diffusion.safetensors"),
    }  # fmt: skip
    assert {row["path"] for row in rows[3:]} == {"shipped"}
    assert len(unreadable) == 1
    assert "classify.safetensors" in unreadable[0]


def test_judges_are_told_from_guides(models, monkeypatch, tmp_path):
    guide = describe(models / "brain" / "regress.safetensors").card
    card = replace(guide, judge=True, guidance={"error": 0.25})
    path = tmp_path / "models" / "brain" / "regress.judge.safetensors"
    save(path, card.build().state_dict(), card.to_json())
    monkeypatch.setattr(doctor, "STARTER", tmp_path / "models")
    ((row,), _) = doctor.model_rows(None)
    assert (row["kind"], row["judge"], doctor.model_fact(row)) == ("regress", True, "brain/regress (judge)")
    facts = doctor.summary(doctor.about_file(path))
    assert (facts["kind"], facts["error on clean images"]) == ("regress (judge)", 0.25)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, ""),
        ({"label": "age", "low": 1.0, "high": 90.0, "mean": 40.0}, "age 1 to 90"),
        ({"label": "class", "classes": ["diseased", "healthy"]}, "class: diseased, healthy"),
        ({"label": "mask"}, "mask"),
        ({"low": 0.5, "high": 1.5}, "0.5 to 1.5"),
    ],
)
def test_what_a_task_learnt_in_words(config, words):
    assert doctor.learnt(config) == words


def test_a_model_is_told_by_its_card(models):
    path = models / "brain" / "regress.safetensors"
    about = doctor.about_file(path)
    assert about["sha256"] == digest(path)
    assert list(about["spec"]["channels"]) == ["t1", "t1ce", "t2", "flair"]
    facts = doctor.summary(about)
    assert (facts["kind"], facts["data set"], facts["learnt"]) == ("regress", "brain", "size 0 to 0.35")
    assert (facts["channels"], facts["size"]) == ("t1, t1ce, t2, flair", "16 x 16")
    assert (facts["value range"], facts["schedule"]) == ("-1 to 1", "linear, T = 50")
    assert (facts["training steps"], facts["loss"]) == (7, 0.5)
    assert facts["parameters"] > 1000
    assert not any(isinstance(value, dict | list) for value in facts.values())


def test_a_volume_is_told_by_its_slices_too(tmp_path):
    volume_(tmp_path / "x_t1.nii.gz", depth=12)
    about = doctor.about_file(tmp_path / "x_t1.nii.gz")
    assert (about["channels"], about["slices"], about["size"]) == (["t1"], 12, [16, 16])
    assert (about["lowest"], about["highest"], about["synthetic"]) == ([0.0], [12.0], False)
    assert doctor.summary(about)["slices"] == 12


def test_an_image_is_told_by_its_channels_geometry_and_intensities(images):
    about = doctor.about_file(images / "slice.nii")
    assert (about["stored as"], about["size"], about["spacing"]) == ("NIfTI, float32", [32, 32], [6.625, 6.625])
    assert about["channels"] == ["0", "1", "2", "3"]
    assert about["lowest"] == [0.0] * 4
    assert doctor.summary(about)["window"] == ["0..1"] * 4
    assert doctor.about_file(images / "case")["channels"] == ["t1", "t1ce", "t2", "flair"]
    face = doctor.about_file(images / "face.png")
    assert (face["stored as"], face["channels"]) == ("picture, mode RGB", ["r", "g", "b"])
    assert "spacing" not in face


def test_what_is_neither_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("neither")
    with pytest.raises(InputError, match=r"notes\.txt: no image format"):
        doctor.about_file(tmp_path / "notes.txt")
    with pytest.raises(ModelError, match=r"gone\.safetensors: no such file"):
        doctor.about_file(tmp_path / "gone.safetensors")
