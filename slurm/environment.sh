# shellcheck shell=bash
# What a job needs before Python starts: different on every cluster, so edit this file. The batch scripts source it in
# the root of the repository, on the job's first node; srun hands its variables on to the others.

# Python: modules of the site, then the environment that `make` made, on a file system that all nodes see.
# module load python/3.11
# shellcheck disable=SC1091
source .venv/bin/activate

# The CPUs that sbatch was asked for a task; srun does not take them over by itself (since Slurm 22.05).
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then
  export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"

# MLflow's server. Without one, the history of all runs goes to the file mlflow.db here.
# export MLFLOW_TRACKING_URI=http://mlflow.example.org:5000

# Credentials for s3:// come from ~/.aws. (Slurm keeps the variables of a submitted job, secrets too.)
# export AWS_PROFILE=training

# The address of the first node, where the nodes' names do not resolve; the network, where a wrong one is chosen.
# export MASTER_ADDR=10.0.0.1
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
