#!/usr/bin/env bash
# A search on ImageNet-1k from beginning to end: ViT-S/16 by DeiT's recipe, one supernet, finalists, one model to take home.
#
#   DATA=/data/imagenet PROCESSES=8 results/imagenet/plan.sh dry-run    # what it will take on this machine; writes nothing
#   DATA=/data/imagenet PROCESSES=8 results/imagenet/plan.sh            # one process for each GPU
#
# DATA: train/CLASS/*.JPEG and val/CLASS/*.JPEG, or wds/FOLDER of shards. Every step continues where it was stopped: give the
# same command again. What is in capitals can be set from outside; results/imagenet/small.sh does so.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
: "${DATA:?the images: DATA=/data/imagenet}" "${OUT:=runs/imagenet}" "${PROCESSES:=1}" "${WORKERS:=12}" "${MORE:=}"
: "${EPOCHS:=300}" "${BATCH:=1024}" "${LR:=1e-3}" "${TRIALS:=1000}" "${BUDGET:=60%}" "${AMP:=bf16}" "${FINALISTS:=8}" "${FINALIST_EPOCHS:=10}"
: "${TRUST:=12}" "${TRUST_EPOCHS:=10}" "${RETRAIN_EPOCHS:=100}" "${POOLSHARE:=python -m poolshare.search.cli}"

together() { python -m torch.distributed.run --standalone --nproc-per-node "$PROCESSES" -m poolshare.search.cli "$@"; }
if [ "$PROCESSES" = 1 ]; then together() { $POOLSHARE "$@"; }; fi

search=(search --data "$DATA" --model vit_small_patch16_224 --budget "$BUDGET" --operators max2d,avg2d --epochs "$EPOCHS"
  --batch-size "$BATCH" --lr "$LR" --amp "$AMP" --recipe "$(cat "$here/supernet.recipe")" --sampler evolution --trials "$TRIALS"
  --workers "$WORKERS" --tracker tensorboard $MORE --out "$OUT/run")

if [ "${1:-}" = dry-run ]; then together "${search[@]}" --dry-run; exit; fi
together "${search[@]}"
$POOLSHARE trust "$OUT/run" --architectures "$TRUST" --twice $((TRUST / 2)) --epochs "$TRUST_EPOCHS" --workers "$WORKERS"
$POOLSHARE finalists "$OUT/run" --budget "$BUDGET" --count "$FINALISTS" --epochs "$FINALIST_EPOCHS" --workers "$WORKERS"
[ -e "$OUT/dense" ] || $POOLSHARE export "$OUT/run" --architecture dense --out "$OUT/dense"
[ -e "$OUT/best" ] || $POOLSHARE export "$OUT/run" --pick finalist --out "$OUT/best"
for model in dense best; do
  [ -e "$OUT/$model-retrained" ] || together retrain "$OUT/$model" --epochs "$RETRAIN_EPOCHS" --batch-size "$BATCH" --lr "$LR" \
    --amp "$AMP" --recipe "$(cat "$here/retrain.recipe")" --workers "$WORKERS" --tracker tensorboard
  $POOLSHARE evaluate "$OUT/$model-retrained" --workers "$WORKERS"
done
