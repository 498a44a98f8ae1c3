# 2 slices over DCN, each v5e-16: 16 chips (4x4) on 4 hosts; the number counts chips
# When training ends the request with all its slices is given back by its first worker, watched or not.

# make a folder for the files of this launch
mkdir -p runs/jobs/gpt

# pack the working tree at commit 0123456789ab
git archive \
    --format=tar.gz \
    --output=runs/jobs/gpt/code.tar.gz 0123456789abcdef0123456789abcdef01234567

# upload it
gcloud storage cp runs/jobs/gpt/code.tar.gz gs://my-bucket/gpt/launch/

# ask for 2 x v5e-16 (32 chips); every worker runs startup.sh when it comes
mkdir -p runs/jobs/gpt
cat > runs/jobs/gpt/startup.sh <<'END_OF_FILE'
#!/bin/bash
# Every worker of gpt runs this as root when it boots.

launch=gs://my-bucket/gpt/launch attempt=1 hosts=8

install() {
    python3 -m pip install --quiet --target ../uv uv  # the image's own Python is older than this project needs
    ../uv/bin/uv venv --quiet --allow-existing --python 3.12 ../venv
    ../uv/bin/uv pip install --quiet --python ../venv/bin/python --constraint constraints/py312.txt --editable '.[tpu]'
}

environment() {
    export TJAX_COMMIT=0123456789abcdef0123456789abcdef01234567
}

train() {
    left=$((7200 + $(cat ../$attempt.began) - $(date +%s))) && exec timeout --signal=TERM --kill-after=300 $((left > 0 ? left : 1)) tjax train gpt2_124m --out there
}

give_back() {
    gcloud compute tpus queued-resources delete gpt --project=my-project --zone=us-west4-a --force --quiet --async
}

set -euo pipefail
home=${TJAX_HOME:-/opt/tjax}
export HOME=${HOME:-/root} PATH=$home/venv/bin:$PATH:/snap/bin
mkdir -p "$home/code"
cd "$home/code"
exec >> ../log 2>&1
[ ! -e "../$attempt.exit" ] || exit 0  # it had ended before this boot
[ -e "../$attempt.began" ] || date +%s > "../$attempt.began"

ended() {
    code=$?
    set +e
    trap - EXIT
    rm -f ../pid
    gcloud storage cp ../log "$launch/logs/$attempt/$(hostname).log"
    # Told to stop, by a preemption, a reboot or `tjax stop`: whoever did it knows what comes next.
    [ $code = 143 ] && exit 143
    echo "$(hostname) $code" > "../$attempt.exit"
    gcloud storage cp "../$attempt.exit" "$launch/exit/$attempt/$(hostname)"
    # The first worker gives the slice back once all have reported, whether or not anybody watches.
    number=$(curl -s -H 'Metadata-Flavor: Google' \
        http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)
    if [ "$number" = 0 ]; then
        for _ in $(seq 60); do
            [ "$(gcloud storage ls "$launch/exit/$attempt/*" | wc -l)" -ge "$hosts" ] && break
            sleep 5
        done
        give_back
    fi
    exit $code
}
trap ended EXIT

gcloud storage cat "$launch/code.tar.gz" | tar -xz
install
environment
# All workers meet and compare versions, commit, clock and disk; one that is missing is named.
python -m transformer_jax.launch.probe --agree

train < /dev/null &
child=$!
echo $child > ../pid
trap 'kill -TERM $child' TERM
code=0
wait $child || code=$?
while kill -0 $child 2> /dev/null; do  # a signal ends `wait` early
    code=0
    wait $child || code=$?
done
exit $code
END_OF_FILE
mkdir -p runs/jobs/gpt
cat > runs/jobs/gpt/shutdown.sh <<'END_OF_FILE'
#!/bin/bash
# Runs when the machine is taken away or reboots: systemd does not pass its SIGTERM on to what a start-up script began.
kill -TERM $(cat /opt/tjax/pid) && timeout 300 tail --pid=$(cat /opt/tjax/pid) -f /dev/null
END_OF_FILE
gcloud compute tpus queued-resources create gpt \
    --project=my-project \
    --zone=us-west4-a \
    --node-count=2 \
    --node-prefix=gpt \
    --accelerator-type=v5litepod-16 \
    --runtime-version=v2-alpha-tpuv5-lite \
    --metadata-from-file=startup-script=runs/jobs/gpt/startup.sh,shutdown-script=runs/jobs/gpt/shutdown.sh \
    --labels=tjax-job=gpt \
    --spot
