# Sourced by train_init.sh and train_long.sh: train.py with a configuration, one process a GPU, or one process on the CPU.
# GPUS: how many of this machine (all). NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: as torchrun knows them.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

launch_training() {  # default configuration, arguments
    local config="$1" train="$LONGLIVE_ROOT/train.py"
    shift
    local arguments=(--config "$config" "$@")
    for word in "$@"; do
        if [[ "$word" == --config || "$word" == --config=* ]]; then
            arguments=("$@")
        fi
    done
    local gpus="${GPUS:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')}"
    if ((gpus == 0)); then
        exec "$PYTHON" "$train" "${arguments[@]}"
    fi
    local nodes=(--standalone)
    if ((${NNODES:-1} > 1)); then
        nodes=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?which machine is this}" --master-addr "${MASTER_ADDR:?address of machine 0}"
            --master-port "${MASTER_PORT:-29500}")
    fi
    exec "$PYTHON" -m torch.distributed.run "${nodes[@]}" --nproc-per-node "$gpus" "$train" "${arguments[@]}"
}
