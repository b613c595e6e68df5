#!/usr/bin/env bash
# One Ray cluster for one job, inside a Slurm allocation:
#   sbatch cluster/slurm.sh ppo --config my-ppo.yaml run_dir=/shared/runs/ppo
# Submit it from the root of a checkout on storage that all nodes share, with a .venv: `python3 -m venv .venv`,
# `.venv/bin/pip install -e '.[gpu]'` (`make install` is for CPUs).
#SBATCH --job-name=rayllm
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --output=rayllm-%j.log
set -euo pipefail
umask 077

cd "${SLURM_SUBMIT_DIR:-.}"
export PATH="$PWD/.venv/bin:$PATH"
export RAY_AUTH_MODE=token PYTHONUNBUFFERED=1
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # from 22.05 on srun does not take it over from sbatch
[[ -n "${RAY_AUTH_TOKEN:-}" || -f ~/.ray/auth_token ]] || (umask 077; ray get-auth-token --generate > /dev/null)

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 10000)) # its own, where a job shares the head's machine with another
per_node=(--num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats)
folder=/tmp/ray-$SLURM_JOB_ID

steps=()
trap 'kill "${steps[@]}" 2> /dev/null; wait' EXIT

srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" \
  ray start --head --block --node-ip-address="$address" --port="$port" --include-dashboard=false \
  --temp-dir="$folder" "${per_node[@]}" > "ray-$SLURM_JOB_ID-head.log" 2>&1 &
steps+=($!)
if ((${#nodes[@]} > 1)); then
  workers=$(IFS=,; echo "${nodes[*]:1}")
  srun --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) --nodelist="$workers" \
    ray start --block --address="$address:$port" "${per_node[@]}" > "ray-$SLURM_JOB_ID-workers.log" 2>&1 &
  steps+=($!)
fi

# Ten minutes for all nodes to join.
export RAY_ADDRESS="$address:$port"
joined='import ray, sys; ray.init(logging_level="ERROR"); sys.exit(len(ray.nodes()) < int(sys.argv[1]))'
for ((second = 0; second < 600; second += 5)); do
  kill -0 "${steps[@]}" # ends the script when a step has ended: its log says why
  python -c "$joined" "${#nodes[@]}" 2> /dev/null && break
  sleep 5
done

# SIGTERM, which Slurm sends ten minutes before the time is up, reaches the job: it saves and ends.
rayllm "$@" &
job=$!
trap 'kill -TERM "$job"' TERM
status=0
wait "$job" || status=$?
if kill -0 "$job" 2> /dev/null; then # it was the signal that ended the wait
  status=0
  wait "$job" || status=$?
fi
exit "$status"
