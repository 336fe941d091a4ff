#!/usr/bin/env bash
# The plan on a subset of the same shape: train/CLASS/ and val/CLASS/ of JPEG files, 64 pixels, few epochs, two processes on CPUs.
# It shows that every step works and fits the next; its accuracies mean nothing.
#
#   results/imagenet/small.sh PHOTOS FOLDER     # PHOTOS: a folder of class folders, or with train/ and test/
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$2"
OUT=$2 DATA=$1 PROCESSES=2 WORKERS=1 EPOCHS=2 BATCH=128 LR=1e-3 TRIALS=60 FINALISTS=3 FINALIST_EPOCHS=1 TRUST=6 TRUST_EPOCHS=1 \
  RETRAIN_EPOCHS=2 MORE="--img-size 64 --levels 16,9,4 --threads 1 --device cpu" "$here/plan.sh"
