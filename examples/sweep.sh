#!/bin/sh
# A sweep over strengths and seeds. Run it again with more of either: outputs that are there are kept.
#
# sh sweep.sh [FOLDER]     the checkpoints go into FOLDER, by default a temporary one
set -eu
cd "${1:-$(mktemp -d)}"

# A checkpoint; yours is a folder, a file or a hub id.
if [ ! -e base ]; then
    mkdir base
    python3 -c '
import numpy
from safetensors.numpy import save_file
draw = numpy.random.default_rng(0)
tensors = {f"layers.{i}.mlp.weight": draw.normal(0, 0.02, (64, 64)).astype("float32") for i in range(4)}
save_file(tensors, "base/model.safetensors")
'
fi

# Six outputs from one read. Each is whole or absent, whatever stops this.
noisytune perturb base --lambda 0.05,0.15 --seed 0-2 --skip-existing -o 'runs/l{lambda}-s{seed}'

# All of them: every byte against the manifest, and the noise itself against the base.
noisytune verify runs/* --base base

# For a table: what noise each got, from the manifests alone.
python3 -c '
import json, sys
for run in sys.argv[1:]:
    noise = json.load(open(run + "/noisytune.json"))["noise"]
    print(run, noise["lambda"], noise["seed"])
' runs/*
