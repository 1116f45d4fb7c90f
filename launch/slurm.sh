# shellcheck shell=bash disable=SC2034,SC2154
# Functions of the batch scripts. They source it in the project's folder, with the variables of the site and `script` set.

refuse() {
  echo "error: $*" >&2
  exit 2
}

# The comment below the #SBATCH lines.
usage() { sed -n '1d;/^#SBATCH/d;/^[^#]/q;s/^# \{0,1\}//p' "$script"; }

# begin ARGUMENTS: look at the job that this is.
begin() {
  [ -n "${SLURM_JOB_ID:-}" ] || refuse "not a Slurm job; submit it: sbatch $script $*"
  # The name that scontrol and scancel know it by: for one task of an array, SLURM_JOB_ID may be all of it.
  job=$SLURM_JOB_ID
  if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
  gpus=${SLURM_GPUS_ON_NODE:-1}
  processes=$((SLURM_JOB_NUM_NODES * gpus))
  restarts=${SLURM_RESTART_COUNT:-0}
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since Slurm 22.05 srun does not take it from sbatch
  local threads=$((SRUN_CPUS_PER_TASK / gpus))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))} # accelerate launch would set 1
  export TOKENIZERS_PARALLELISM=false
  local module
  for module in "${modules[@]}"; do module load "$module"; done
}

# field FILE KEY ...: a value of a JSON or YAML file, by its path of keys; nothing where there is none.
field() {
  "$python" -c '
import json, os, sys
file, *keys = sys.argv[1:]
try:
    with open(file, encoding="utf-8") as stream:
        if file.endswith(".json"):
            value = json.load(stream)
        else:
            import yaml

            value = yaml.safe_load(stream)
except (OSError, ValueError, ImportError) as error:
    sys.exit(f"error: {file} cannot be read: {error}")
except Exception as error:  # of YAML, on several lines
    sys.exit(f"error: {file} is not YAML: " + " ".join(str(error).split()))
for key in keys:
    value = value.get(key) if isinstance(value, dict) else None
text = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
sys.stdout.buffer.write(os.fsencode(text))
' "$@"
}

say() { printf '== %s job %s: %s\n' "$(date '+%F %T')" "$job" "$*"; }

# launch ARGUMENTS: `accelerate launch ARGUMENTS` on every node, in the background; `wait_for_step` waits for it.
launch() {
  [ -f "accelerate_configs/$accelerate_config.yaml" ] || refuse "no accelerate_configs/$accelerate_config.yaml"
  local first port=$((20000 + SLURM_JOB_ID % 10000)) rendezvous=() replicas=()
  if [[ $accelerate_config == *hsdp ]]; then # a replica of the model on each node
    replicas=(--parallelism_config_dp_replicate_size "$SLURM_JOB_NUM_NODES"
      --parallelism_config_dp_shard_size $((processes / SLURM_JOB_NUM_NODES)))
  fi
  if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    first=$(scontrol show node "$SLURMD_NODENAME" --oneliner | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
    # c10d numbers the nodes itself. With --machine_rank 0 accelerate would refuse a port that another launcher of the
    # job already waits on, where nodes share a host.
    rendezvous=(--rdzv_backend c10d --machine_rank 1 --main_process_ip "$first")
  fi
  # One task a node, and the whole step ends when one of them fails.
  srun --nodes "$SLURM_JOB_NUM_NODES" --ntasks-per-node 1 --kill-on-bad-exit=1 --wait=60 \
    "$python" launch/block_signals.py TERM,USR1,USR2 -m accelerate.commands.launch --config_file "accelerate_configs/$accelerate_config.yaml" \
    --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$processes" --main_process_port "$port" \
    "${replicas[@]}" "${rendezvous[@]}" "$@" &
  step=$!
}

# Wait for the step to end, whatever signals come: a trapped one ends `wait`, not the step. Its exit code is in `code`.
wait_for_step() {
  while true; do
    code=0
    wait "$step" || code=$?
    kill -0 "$step" 2>/dev/null || return 0
  done
}

# Put this job back into the queue, unless that was done too often. Does not return.
requeue() {
  if [ "$restarts" -ge "$max_restarts" ]; then
    say "$*; not requeued: restarted $restarts times, the most that is allowed (max_restarts). Submit it again to go on."
    exit 1
  fi
  say "$*; requeued (restart $((restarts + 1)))"
  scontrol requeue "$job"
  exit 0
}
