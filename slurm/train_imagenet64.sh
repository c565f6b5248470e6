#!/usr/bin/env bash
# Train on Slurm:  sbatch slurm/train_imagenet64.sh [flags of `python -m pipeline.train`]     (docs/slurm.md)
#
# Options of sbatch before the script's name override the lines below, as in
#   sbatch --nodes=4 --partition=a100 slurm/train_imagenet64.sh --out s3://bucket/runs/first

#SBATCH --job-name=iddpm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8          # one per GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00              # per allocation: the job resumes in the next
##SBATCH --partition=gpu             # required on many sites
##SBATCH --account=project

# Two minutes before the limit, the run is told to checkpoint, and the job is requeued.
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
source slurm/job.sh
source slurm/environment.sh

flags=(--preset imagenet64 "$@")
run srun --mpi=none --kill-on-bad-exit=1 python -m pipeline.train "${flags[@]}"
if [[ -z "$warned" ]] && ((status > 128)) && was_interrupted "${flags[@]}"; then
  status=75 # srun kills the last tasks to leave, and their status hides the others'
fi
finish
