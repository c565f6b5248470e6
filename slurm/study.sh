#!/usr/bin/env bash
# One run of a scaling study for each task of an array. The usual way to submit it, with what is not done yet:
#   python -m jobs.study run studies/imagenet64.yaml --launcher slurm     (docs/slurm.md)
# and by hand:
#   sbatch --array=0-19 slurm/study.sh studies/imagenet64.yaml     (numbers of runs, from 0: 4 sizes at 5 budgets)

#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1          # several GPUs to a run: as many here
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
