#!/usr/bin/env bash
# A real Slurm with virtual nodes on this one machine: no systemd, no cgroups, no containers.
#
#   tests/slurm/cluster.sh start     install what is missing (root on Debian), start the daemons, wait for idle nodes
#   tests/slurm/cluster.sh stop      cancel all jobs, stop the daemons by their pid files
#   tests/slurm/cluster.sh status    which daemons run, and sinfo
#   tests/slurm/cluster.sh revive N  start the daemon of node N again (after a test killed it)
#
# Settings by environment: SLURM_DIR (state, logs; default /tmp/posttrain-slurm), NODES=2, CPUS=4 a node,
# BASE_PORT=16817 (this and the next 20 are used), KILL_WAIT=20, SLURMD_TIMEOUT=10 (seconds).
# To talk to it: export SLURM_CONF=$SLURM_DIR/etc/slurm.conf
# Exit status: 0 done, 1 failed, 77 cannot run here (not root, or no Debian packages).
set -euo pipefail

DIR=${SLURM_DIR:-/tmp/posttrain-slurm}
NODES=${NODES:-2}
CPUS=${CPUS:-4}
BASE_PORT=${BASE_PORT:-16817}
KILL_WAIT=${KILL_WAIT:-20}
SLURMD_TIMEOUT=${SLURMD_TIMEOUT:-10}
DBD_PORT=$((BASE_PORT + 1))
SQL_PORT=$((BASE_PORT + 2))
HOST=$(hostname -s)
SOCKET=$DIR/run/munge.socket
export SLURM_CONF=$DIR/etc/slurm.conf

cannot() {
  echo "cluster.sh: $1" >&2
  exit 77
}

install_packages() {
  local programs=(slurmctld slurmd slurmdbd munged mariadbd sbatch) missing=() program
  for program in "${programs[@]}"; do command -v "$program" >/dev/null || missing+=("$program"); done
  ((${#missing[@]})) || return 0
  command -v apt-get >/dev/null || cannot "${missing[*]} missing and no apt-get to install them with"
  echo "cluster.sh: installing Slurm from Debian's packages (missing: ${missing[*]})"
  export DEBIAN_FRONTEND=noninteractive
  if ! { timeout 60 apt-get update && timeout 300 apt-get install -y --no-install-recommends \
    slurm-wlm slurm-wlm-basic-plugins slurmdbd munge mariadb-server; } >"${TMPDIR:-/tmp}/slurm-install.log" 2>&1; then
    cannot "apt-get could not install Slurm: $(tail -n 1 "${TMPDIR:-/tmp}/slurm-install.log")"
  fi
}

pid_file() { echo "$DIR/run/$1.pid"; }

alive() {
  local file
  file=$(pid_file "$1")
  [[ -s $file ]] && kill -0 "$(<"$file")" 2>/dev/null
}

wait_for() { # SECONDS DESCRIPTION COMMAND...
  local limit=$1 what=$2
  local end=$((SECONDS + limit))
  shift 2
  while ((SECONDS < end)); do
    if timeout 10 "$@" >/dev/null 2>&1; then return 0; fi
    sleep 0.2
  done
  echo "cluster.sh: waited ${limit}s for $what; see the logs in $DIR/log" >&2
  return 1
}

stop_daemons() { # NAME...: by their pid files only, all at once
  local name file pid pids=()
  for name in "$@"; do
    file=$(pid_file "$name")
    [[ -s $file ]] || continue
    pid=$(<"$file")
    kill "$pid" 2>/dev/null && pids+=("$pid")
    rm -f "$file"
  done
  for pid in "${pids[@]}"; do
    for ((i = 0; i < 75; i++)); do
      # A zombie is gone too, though whoever inherited it has not noticed.
      [[ -e /proc/$pid/stat && $(cut -d' ' -f3 "/proc/$pid/stat" 2>/dev/null) != Z ]] || continue 2
      sleep 0.2
    done
    kill -KILL "$pid" 2>/dev/null || true
  done
}

write_configuration() {
  mkdir -p "$DIR"/{etc,run,log,state,spool,munge,mysql}
  chmod 755 "$DIR" "$DIR"/*
  chmod 700 "$DIR/munge"
  if [[ ! -s $DIR/munge/key ]]; then
    dd if=/dev/urandom of="$DIR/munge/key" bs=128 count=1 status=none
    chmod 400 "$DIR/munge/key"
  fi
  # config_overrides: the virtual nodes have more CPUs than the machine. linuxproc: no cgroups in a container.
  cat >"$SLURM_CONF" <<CONF
ClusterName=posttrain
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$BASE_PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$SOCKET,cred_expire=5
CredType=cred/munge
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$(pid_file slurmctld)
SlurmdPidFile=$(pid_file slurmd-%n)
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
MinJobAge=300
KillWait=$KILL_WAIT
SlurmdTimeout=$SLURMD_TIMEOUT
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$HOST
AccountingStoragePort=$DBD_PORT
AccountingStoragePass=$SOCKET
CONF
  for ((i = 1; i <= NODES; i++)); do
    echo "NodeName=node$i NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((BASE_PORT + 10 + i)) CPUs=$CPUS RealMemory=8000 State=UNKNOWN" >>"$SLURM_CONF"
  done
  echo "PartitionName=cpu Nodes=node[1-$NODES] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO" >>"$SLURM_CONF"
  cat >"$DIR/etc/slurmdbd.conf" <<CONF
DbdHost=$HOST
DbdAddr=127.0.0.1
DbdPort=$DBD_PORT
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$SOCKET
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$SQL_PORT
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
LogFile=$DIR/log/slurmdbd.log
PidFile=$(pid_file slurmdbd)
CONF
  chmod 600 "$DIR/etc/slurmdbd.conf"
}

start_accounting() { # sacct, which NeMo-Run asks for a job's state
  local client=(mariadb --no-defaults -uroot "--socket=$DIR/mysql/socket")
  if ! alive mariadbd; then
    chown mysql: "$DIR/mysql"
    [[ -d $DIR/mysql/mysql ]] || mariadb-install-db --no-defaults --user=mysql --datadir="$DIR/mysql" \
      --skip-test-db >"$DIR/log/mysql_install.log" 2>&1
    touch "$DIR/log/mariadbd.log"
    chown mysql: "$DIR/log/mariadbd.log"
    setsid mariadbd --no-defaults --user=mysql --datadir="$DIR/mysql" --socket="$DIR/mysql/socket" \
      --pid-file="$DIR/mysql/pid" --bind-address=127.0.0.1 --port="$SQL_PORT" --innodb-buffer-pool-size=64M \
      --innodb-lock-wait-timeout=900 --log-error="$DIR/log/mariadbd.log" </dev/null >/dev/null 2>&1 &
    echo $! >"$(pid_file mariadbd)"
  fi
  wait_for 60 mariadbd "${client[@]}" -e "SELECT 1"
  "${client[@]}" -e "CREATE DATABASE IF NOT EXISTS slurm_acct_db;
    CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';
    CREATE USER IF NOT EXISTS 'slurm'@'localhost' IDENTIFIED BY 'slurm';
    GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1'; GRANT ALL ON slurm_acct_db.* TO 'slurm'@'localhost';"
  alive slurmdbd || slurmdbd
  wait_for 60 slurmdbd sacctmgr -n show cluster
  [[ -n $(sacctmgr -n -P show cluster posttrain) ]] || sacctmgr -i add cluster posttrain >/dev/null
  [[ -n $(sacctmgr -n -P show account posttrain) ]] || sacctmgr -i add account posttrain cluster=posttrain >/dev/null
  [[ -n $(sacctmgr -n -P show assoc user=root account=posttrain) ]] ||
    sacctmgr -i add user root account=posttrain cluster=posttrain >/dev/null
}

idle_nodes() { [[ $(sinfo -h -N -o %T | grep -c '^idle$') -ge $NODES ]]; }
controller_up() { [[ $(scontrol ping) == *"is UP"* ]]; }

start_node() { # N
  alive "slurmd-node$1" || timeout 30 slurmd -N "node$1"
  scontrol update "nodename=node$1" state=resume 2>/dev/null || true # fails when the node needs no resuming
}

start() {
  [[ $(id -u) == 0 ]] || cannot "needs root, to install and start Slurm's daemons"
  install_packages
  write_configuration
  if ! alive munged; then
    rm -f "$SOCKET"*
    munged --key-file="$DIR/munge/key" --socket="$SOCKET" --pid-file="$(pid_file munged)" \
      --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge/seed" --force --num-threads=2
  fi
  wait_for 10 munged munge -S "$SOCKET" -n
  start_accounting
  alive slurmctld || slurmctld
  export -f controller_up idle_nodes
  export NODES
  wait_for 30 slurmctld bash -c controller_up
  for ((i = 1; i <= NODES; i++)); do start_node "$i"; done
  wait_for 60 "$NODES idle nodes" bash -c idle_nodes
  sinfo
}

stop() {
  local file nodes=()
  if alive slurmctld; then scancel --user=root || true; fi
  for file in "$DIR"/run/slurmd-*.pid; do
    [[ -e $file ]] && nodes+=("$(basename "$file" .pid)")
  done
  stop_daemons "${nodes[@]}"
  stop_daemons slurmctld slurmdbd
  stop_daemons mariadbd munged
}

status() {
  local file name
  for file in "$DIR"/run/*.pid; do
    [[ -e $file ]] || continue
    name=$(basename "$file" .pid)
    if alive "$name"; then echo "$name runs as $(<"$file")"; else echo "$name is down"; fi
  done
  sinfo -N -l
}

case "${1:-}" in
start) start ;;
stop) stop ;;
status) status ;;
revive) start_node "$2" ;;
*)
  sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
  exit 2
  ;;
esac
