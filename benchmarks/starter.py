"""Train the shipped models, and pack them: half precision, into knife/starter/phantom.

python benchmarks/starter.py train [--device auto]     # runs the commands below; hours on a CPU, resumes when repeated
python benchmarks/starter.py pack [--models models]    # packs what was trained

The models in the package come from this data set, but were trained in several stretches, the first of them with earlier
versions of the loop; to save time, regress began with segment's weights and took 3,500 steps, classify with those of
regress and took 500, and its temperatures were fitted later, the weights held. Training anew gives models of the same
kind, not the same bits.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from knife.checkpoint import describe, read_tensors, save

STARTER = Path(__file__).resolve().parents[1] / "knife" / "starter"  # of this checkout, wherever knife is installed

PIXELS = "relative size of the mask, pixel by pixel"
COMMANDS = (
    "phantom data/phantom --count 6000 --size 64 --seed 1",
    "train diffusion --data data/phantom --preset small-64 --steps 12500",
    "train regress --data data/phantom --preset small-64 --steps 7000 --label '" + PIXELS + "'",
    "train classify --data data/phantom --preset small-64 --steps 7000",
    "train segment --data data/phantom --preset small-64 --steps 3500",
    "calibrate phantom --data data/phantom",
)


def train(device: str) -> None:
    """Run every command; a data set that is there already is used, a training that was stopped resumes."""
    knife = str(Path(sys.executable).with_name("knife"))
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] == "phantom" and Path(words[1]).exists():
            continue
        subprocess.run([knife, *words, *(["--device", device] if words[0] == "train" else [])], check=True)


def pack(models: Path) -> None:
    """Store each model in half precision among the shipped ones; its card stays, its seal is made anew."""
    for kind in ("diffusion", "regress", "classify", "segment"):
        stored = describe(models / "phantom" / f"{kind}.safetensors")
        halves = {name: tensor.half() for name, tensor in read_tensors(stored.path).items()}
        out = STARTER / "phantom" / stored.path.name
        save(out, halves, stored.card.to_json())
        print(f"{out.name}: {out.stat().st_size / 2**20:.1f} MiB, step {stored.card.training.get('step')}")


def main() -> None:
    """Do what the first argument says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "pack"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--models", type=Path, default=Path("models"))
    options = parser.parse_args()
    if options.what == "train":
        train(options.device)
    else:
        pack(options.models)


if __name__ == "__main__":
    main()
