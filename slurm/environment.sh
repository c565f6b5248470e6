# shellcheck shell=bash
# What a job needs before Python starts. It differs between clusters, so edit this file. The batch scripts source it in
# the root of the repository, on the job's first node; srun passes its variables on to the others.

# Python: the site's modules, then the environment created by `make`, on a file system that all nodes see.
# module load python/3.11
# shellcheck disable=SC1091
source .venv/bin/activate

# The CPUs per task requested from sbatch; since Slurm 22.05 srun does not inherit them.
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then
  export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"

# The MLflow server. Without one, the history of all runs goes to the file mlflow.db here.
# export MLFLOW_TRACKING_URI=http://mlflow.example.org:5000

# Credentials for s3:// come from ~/.aws. (Slurm stores the variables of a submitted job, including secrets.)
# export AWS_PROFILE=training

# The first node's address, if node names do not resolve; the network interface, if the wrong one is chosen.
# export MASTER_ADDR=10.0.0.1
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
