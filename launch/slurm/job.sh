# shellcheck shell=bash
# The part of a batch script that saves and requeues. train.sbatch sources it; NeMo-Run's executor copies it into
# the scripts it makes. Needs $logs, the log folder that node.py is given.

attempt=${logs:?}/attempt_${SLURM_RESTART_COUNT:-0}
mkdir -p "$attempt"
rm -f "$attempt/stop" "$attempt/status" "$attempt/out_of_time" # of another job, if this folder was given before

# The trainer saves and ends while two more of its steps and a checkpoint still fit; USR1 is for one that did not see it.
end=${SLURM_JOB_END_TIME:-}
if [[ -z $end ]] && end=$(squeue --noheader --job "$SLURM_JOB_ID" --format %e 2>/dev/null); then
  end=$(date -d "$end" +%s 2>/dev/null) || end= # N/A: no limit
fi
export POSTTRAIN_JOB_END=$end POSTTRAIN_OUT_OF_TIME=$attempt/out_of_time

out_of_time=
trap 'out_of_time=yes; touch "$attempt/stop"; echo "launch: the time limit is near, asking for a checkpoint"' USR1
# From scancel or a preemption. The workers get it too, and Slurm itself decides whether the job is queued again.
trap 'echo "launch: Slurm ends this attempt"' TERM

# srun in the background, because bash runs a trap only between commands, and `wait` ends early for one.
srun() {
  command srun "$@" &
  local step=$! status=0
  wait "$step" || status=$?
  while kill -0 "$step" 2>/dev/null; do
    status=0
    wait "$step" || status=$?
  done
  # What the first node says; srun's status can be that of a task which it ended itself.
  if [[ -s $attempt/status ]]; then status=$(<"$attempt/status"); fi
  if [[ $status == 75 && (-n $out_of_time || -e $attempt/out_of_time) ]]; then
    echo "launch: a checkpoint is saved, the job goes back to the queue"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  return "$status"
}
