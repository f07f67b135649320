#!/usr/bin/env bash
# Trains a config with TorchTitan: NGPU=4 CONFIG_FILE=train_configs/x.toml ./run_train.sh --training.steps 50
# NGPU: processes (CPU processes over gloo where there is no accelerator). LOG_RANK: ranks to print, e.g. 0,1; by
# default the one that knows the loss. TITAN: TorchTitan's generation, 0.2 (default) or 0.3.
set -e
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
prepare "${TITAN:-0.2}"

export NGPU=${NGPU:-1}
CONFIG_FILE=${CONFIG_FILE:-$ROOT/train_configs/debug.toml}

# One process needs no launcher, whose imports take seconds. It ends by itself, with one sentence, where a config cannot
# train.
if [ "$NGPU" = 1 ]; then
    exec python -m gdn2_titan.titan.train --job.config_file "$CONFIG_FILE" "$@"
fi

# Of many, a config that cannot train ends here; torchrun would add a page of its own.
RANK_WITH_LOSS=$(python -W ignore -m gdn2_titan.titan.check --job.config_file "$CONFIG_FILE" "$@")
export LOG_RANK=${LOG_RANK:-$RANK_WITH_LOSS}

exec torchrun --nproc_per_node="$NGPU" --rdzv_backend c10d --rdzv_endpoint=localhost:0 \
    --local-ranks-filter "$LOG_RANK" --role rank --tee 3 \
    -m gdn2_titan.titan.train --job.config_file "$CONFIG_FILE" "$@"
