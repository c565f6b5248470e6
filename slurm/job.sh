# shellcheck shell=bash
# Shared by the batch scripts: `run` a command that Slurm may stop, then `finish` the job or requeue it.
#
# USR1 to this shell is Slurm's warning before the time limit (--signal=B:USR1@120) and before preemption. It is
# forwarded, and the job is requeued. TERM is final: from scancel, or because Slurm itself removes the job from its nodes.

max_restarts="${MAX_RESTARTS:-200}" # per job, so that nothing requeues forever
patience=90                         # seconds from the warning; a command still running then is killed, and resumes later

if [[ -z "${SLURM_JOB_ID:-}" ]]; then
  echo "error: not in a Slurm job; submit this script with sbatch, or run it inside salloc" >&2
  exit 2
fi

command="" warned="" ended="" heard=""
trap 'warned=yes; echo "warned by Slurm"; pass_on' USR1
trap 'ended=yes; pass_on' TERM INT

pass_on() {
  heard=yes
  if [[ "$command" ]]; then
    kill -USR1 "$command" 2>/dev/null || true
  fi
}

# run COMMAND...: leaves its exit status in `status`.
run() {
  local left="$patience"
  "$@" &
  command=$!
  if [[ "$heard" ]]; then
    pass_on # a signal that came before it started
  fi
  # A trapped signal interrupts `wait`, not the command: wait again.
  while
    heard="" status=0
    wait "$command" || status=$?
    [[ "$heard" ]]
  do
    while kill -0 "$command" 2>/dev/null; do
      ((left-- > 0)) || kill -KILL "$command" 2>/dev/null || true
      sleep 1
    done
  done
}

# was_interrupted FLAGS...: whether the folder of the run with these flags of pipeline.train records an interruption.
was_interrupted() {
  python -c '
import sys
from pipeline.cli import parse_train
from pipeline.run.interrupted import was_interrupted
from pipeline.storage.store import Store
config, _ = parse_train(sys.argv[1:])
sys.exit(not was_interrupted(Store(config.out, config.storage)))
' "$@"
}

# Exit with `status`. A command that was interrupted (75), or killed by the warning or when patience ran out (above 128),
# is not done: the job is requeued and runs its script again.
finish() {
  local job="$SLURM_JOB_ID" state
  if [[ -n "${SLURM_ARRAY_JOB_ID:-}" ]]; then
    job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" # one task's SLURM_JOB_ID is the whole array's
  fi
  if [[ "$warned" ]] && ((status > 128)); then
    status=75
  fi
  if ((status != 75)) || [[ "$ended" ]]; then
    exit "$status"
  fi
  # In another state someone else has decided, and scontrol would revive even a cancelled job.
  state="$(scontrol show job "$job")"
  if [[ "$state" != *JobState=RUNNING* || "$state" != *BatchFlag=1* ]]; then
    echo "interrupted; the same command resumes"
  elif ((${SLURM_RESTART_COUNT:-0} >= max_restarts)); then
    echo "interrupted, not requeued: job $job has restarted $max_restarts times (MAX_RESTARTS)" >&2
  else
    echo "interrupted: requeueing job $job"
    scontrol requeue "$job"
  fi
  exit "$status"
}
