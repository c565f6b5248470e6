#!/usr/bin/env bash
# One run of a scaling study per task of an array. Usually submitted, for the unfinished runs, by
#   python -m jobs.study run studies/imagenet64.yaml --launcher slurm     (docs/slurm.md)
# or by hand:
#   sbatch --array=0-19 slurm/study.sh studies/imagenet64.yaml     (run numbers, from 0: 4 sizes at 5 budgets)

#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1          # for N GPUs per run: N here and in the next line
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
##SBATCH --partition=gpu
##SBATCH --account=project

#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
source slurm/job.sh
source slurm/environment.sh

run python -m jobs.study run "$@" --only "$SLURM_ARRAY_TASK_ID" --prefix 'srun --mpi=none --kill-on-bad-exit=1'
finish
