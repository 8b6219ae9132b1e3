{{/* Names and labels that several templates share. */}}

{{- define "btx-operator.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else if hasPrefix (print .Release.Name "-") $name -}}
{{- /* Release btx: btx-operator, not btx-btx-operator. */ -}}
{{- $name -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "btx-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "btx-operator.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "btx-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: btx
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{/* Of what belongs to the trainer: component trainer, else the same. */}}
{{- define "btx-operator.trainerLabels" -}}
{{- include "btx-operator.labels" . | replace "component: operator" "component: trainer" -}}
{{- end -}}

{{- define "btx-operator.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "btx-operator.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name: needed when serviceAccount.create is false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Argument: a list of an image block and the chart's appVersion. */}}
{{- define "btx-operator.image" -}}
{{- $image := index . 0 -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository (default (index . 1) $image.tag) -}}
{{- end -}}
{{- end -}}

{{/* The operator's settings as JSON: what it reads from BTX_SETTINGS. */}}
{{- define "btx-operator.settings" -}}
{{- $accounts := list -}}
{{- range .Values.trainer.serviceAccounts }}{{ $accounts = append $accounts .name }}{{ end -}}
{{- merge (dict
      "namespaces" .Values.namespaces
      "trainerImage" (include "btx-operator.image" (list .Values.trainer.image .Chart.AppVersion))
      "imagePullPolicy" .Values.trainer.image.pullPolicy
      "imagePullSecrets" .Values.trainer.imagePullSecrets
      "serviceAccounts" $accounts
    ) .Values.settings | toJson -}}
{{- end -}}

{{/* Restricted Pod Security Standard. */}}
{{- define "btx-operator.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "btx-operator.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}
