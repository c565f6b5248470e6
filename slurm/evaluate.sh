#!/usr/bin/env bash
# Evaluate on Slurm:  sbatch slurm/evaluate.sh RUN [flags of `python -m pipeline.evaluate`]     (docs/slurm.md)

#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8          # one per GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
##SBATCH --partition=gpu
##SBATCH --account=project

#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
source slurm/job.sh
source slurm/environment.sh

run srun --mpi=none --kill-on-bad-exit=1 python -m pipeline.evaluate "$@"
finish
