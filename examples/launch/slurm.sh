#!/bin/bash
# sbatch examples/launch/slurm.sh my_recipe.yaml [key=value ...]
# Two machines of eight GPUs. Two minutes before the time is up the processes are sent SIGTERM: the run
# saves the steps it has done and ends, the job goes back into the queue and goes on from there.
# With processes.rewards=1 after the recipe the last GPU of the last machine is the judges'.
#SBATCH --job-name=qirl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: sbatch $0 RECIPE.yaml [key=value ...]" >&2; exit 2; }

again=0
trap 'again=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 # reaches the job's steps, not this script
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 .venv/bin/torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$host:29500" --rdzv-id "$SLURM_JOB_ID" \
  -m qirl_fast.train "$@" resume=auto &
status=0
wait $! || status=$?
if [ "$again" -eq 1 ]; then
  wait || true # the signal ended the first wait, not srun
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
