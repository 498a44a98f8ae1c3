# 2 slices over DCN, each v5e-16: 16 chips (4x4) on 4 hosts; the number counts chips
# With xpk, from an image that holds the tree and its packages:
# xpk workload create --workload=gpt --cluster=my-cluster --project=my-project --zone=us-west4-a --tpu-type=v5litepod-16 --num-slices=2 --max-restarts=10 --docker-image=python:3.12 --spot --command='tjax train gpt2_124m --out there'

# make a folder for the files of this launch
mkdir -p runs/jobs/gpt

# pack the working tree at commit 0123456789ab
git archive \
    --format=tar.gz \
    --output=runs/jobs/gpt/code.tar.gz 0123456789abcdef0123456789abcdef01234567

# upload it
gcloud storage cp runs/jobs/gpt/code.tar.gz gs://my-bucket/gpt/launch/

# let kubectl reach the cluster
gcloud container clusters get-credentials my-cluster --location=us-west4-a --project=my-project

# remove what is left of an earlier launch
kubectl delete jobset gpt \
    --context=gke_my-project_us-west4-a_my-cluster \
    --namespace=default \
    --ignore-not-found

# hand the JobSet to the cluster
mkdir -p runs/jobs/gpt
cat > runs/jobs/gpt/jobset.json <<'END_OF_FILE'
{
  "apiVersion": "jobset.x-k8s.io/v1alpha2",
  "kind": "JobSet",
  "metadata": {
    "name": "gpt",
    "namespace": "default",
    "annotations": {
      "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
  },
  "spec": {
    "failurePolicy": {
      "maxRestarts": 10,
      "rules": [
        {
          "name": "final",
          "action": "FailJobSet",
          "onJobFailureReasons": [
            "PodFailurePolicy"
          ]
        }
      ]
    },
    "replicatedJobs": [
      {
        "name": "slice",
        "replicas": 2,
        "template": {
          "spec": {
            "parallelism": 4,
            "completions": 4,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "podFailurePolicy": {
              "rules": [
                {
                  "action": "FailJob",
                  "onExitCodes": {
                    "containerName": "train",
                    "operator": "In",
                    "values": [
                      2,
                      124
                    ]
                  }
                }
              ]
            },
            "template": {
              "spec": {
                "restartPolicy": "Never",
                "hostNetwork": true,
                "dnsPolicy": "ClusterFirstWithHostNet",
                "terminationGracePeriodSeconds": 300,
                "nodeSelector": {
                  "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
                  "cloud.google.com/gke-tpu-topology": "4x4",
                  "cloud.google.com/gke-spot": "true"
                },
                "tolerations": [
                  {
                    "key": "google.com/tpu",
                    "operator": "Exists",
                    "effect": "NoSchedule"
                  },
                  {
                    "key": "cloud.google.com/gke-spot",
                    "operator": "Equal",
                    "value": "true",
                    "effect": "NoSchedule"
                  }
                ],
                "initContainers": [
                  {
                    "name": "fetch",
                    "image": "gcr.io/google.com/cloudsdktool/google-cloud-cli:slim",
                    "command": [
                      "bash",
                      "-c",
                      "set -o pipefail; gcloud storage cat gs://my-bucket/gpt/launch/code.tar.gz | tar -xz -C /code && { gcloud storage cat gs://my-bucket/gpt/launch/began/1 > /code/.began || { date +%s > /code/.began && gcloud storage cp /code/.began gs://my-bucket/gpt/launch/began/1; }; }"
                    ],
                    "volumeMounts": [
                      {
                        "name": "code",
                        "mountPath": "/code"
                      }
                    ]
                  }
                ],
                "containers": [
                  {
                    "name": "train",
                    "image": "python:3.12",
                    "workingDir": "/code",
                    "command": [
                      "bash",
                      "-c",
                      "version=$(python -c 'import sys; print(\"%d%d\" % sys.version_info[:2])') && pip install --quiet --constraint constraints/py$version.txt --editable '.[tpu]' && python -m transformer_jax.launch.probe --agree && left=$((7200 + $(cat /code/.began) - $(date +%s))) && exec timeout --signal=TERM --kill-after=300 $((left > 0 ? left : 1)) tjax train gpt2_124m --out there"
                    ],
                    "env": [
                      {
                        "name": "TJAX_COMMIT",
                        "value": "0123456789abcdef0123456789abcdef01234567"
                      }
                    ],
                    "ports": [
                      {
                        "containerPort": 8471
                      },
                      {
                        "containerPort": 8482
                      },
                      {
                        "containerPort": 8080
                      }
                    ],
                    "resources": {
                      "requests": {
                        "google.com/tpu": "4"
                      },
                      "limits": {
                        "google.com/tpu": "4"
                      }
                    },
                    "volumeMounts": [
                      {
                        "name": "code",
                        "mountPath": "/code"
                      }
                    ]
                  }
                ],
                "volumes": [
                  {
                    "name": "code",
                    "emptyDir": {}
                  }
                ]
              }
            }
          }
        }
      }
    ]
  }
}
END_OF_FILE
kubectl apply \
    --context=gke_my-project_us-west4-a_my-cluster \
    --namespace=default \
    --filename=runs/jobs/gpt/jobset.json
