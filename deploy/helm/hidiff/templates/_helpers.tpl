{{- define "hidiff.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "hidiff.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "hidiff.labels" -}}
{{ include "hidiff.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* The fields of a pod that both modes share. */}}
{{- define "hidiff.pod" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ .Values.terminationSeconds }}
securityContext:
  runAsNonRoot: true
  runAsUser: 1000
  runAsGroup: 1000
  fsGroup: 1000
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
volumes:
  {{- if not .Values.storage.uri }}
  - name: models
    persistentVolumeClaim:
      claimName: {{ required "storage.claim or storage.uri must say where the model repository is" .Values.storage.claim }}
      readOnly: true
  {{- end }}
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: {{ .Values.shm }}}
  - name: tmp
    emptyDir: {sizeLimit: {{ .Values.tmp }}}
containers:
  - {{- include "hidiff.container" . | nindent 4 }}
{{- end }}

{{/* An image by its digest, and by its tag alone where there is none. */}}
{{- define "hidiff.image" -}}
{{- $image := .Values.image }}
{{- if contains "@" $image.repository }}{{ $image.repository }}
{{- else if $image.digest }}{{ $image.repository }}@{{ $image.digest }}
{{- else }}{{ $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}
{{- end }}
{{- end }}

{{- define "hidiff.container" -}}
name: {{ if eq .Values.mode "kserve" }}kserve-container{{ else }}triton{{ end }}
image: {{ include "hidiff.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
args:
  - /usr/local/bin/hidiff-triton
  {{- range .Values.extraArgs }}
  - {{ . | quote }}
  {{- end }}
env:
  {{- if .Values.storage.uri }}
  - name: STORAGE_URI
    value: {{ .Values.storage.uri | quote }}
  - name: MODEL_REPOSITORY
    value: {{ printf "/mnt/models/%s" .Values.storage.repository | trimSuffix "/" }}
  {{- else }}
  - name: MODEL_REPOSITORY
    value: /models
  {{- end }}
  {{- with .Values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
ports:
  # The first is the one that KServe's Service puts on port 80.
  - {name: http, containerPort: 8000, protocol: TCP}
  - {name: grpc, containerPort: 8001, protocol: TCP}
  - {name: metrics, containerPort: 8002, protocol: TCP}
resources:
  requests: {{- toYaml .Values.resources.requests | nindent 4 }}
  limits:
    {{- toYaml .Values.resources.limits | nindent 4 }}
    {{- if .Values.gpus }}
    nvidia.com/gpu: {{ .Values.gpus }}
    {{- end }}
securityContext:
  allowPrivilegeEscalation: false
  privileged: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  capabilities: {drop: [ALL]}
  seccompProfile: {type: RuntimeDefault}
# Ready is true once hashes, reference samples and the warm-up picture passed.
startupProbe:
  httpGet: {path: /v2/health/ready, port: 8000}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: {{ div (add .Values.startupSeconds 9) 10 }}
readinessProbe:
  httpGet: {path: /v2/health/ready, port: 8000}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
# Triton goes on to say that it is ready when a model's process was killed; the heartbeat stops.
livenessProbe:
  exec:
    command:
      - /opt/hidiff/bin/python
      - -m
      - hidiff_runtime.serving.probe
      - http://127.0.0.1:8002/metrics
      - --older-than
      - {{ .Values.heartbeatSeconds | quote }}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 3
volumeMounts:
  {{- if not .Values.storage.uri }}
  - name: models
    mountPath: /models
    {{- with .Values.storage.repository }}
    subPath: {{ . }}
    {{- end }}
    readOnly: true
  {{- with .Values.storage.bundle }}
  - name: models
    mountPath: /bundle
    subPath: {{ . }}
    readOnly: true
  {{- end }}
  {{- end }}
  - {name: shm, mountPath: /dev/shm}
  - {name: tmp, mountPath: /tmp}
{{- end }}
