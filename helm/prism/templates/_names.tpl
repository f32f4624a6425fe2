{{/* Prefix of all names: the release's name, with the chart's unless it is in it already. */}}
{{- define "prism.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "prism.operator" -}}
{{ include "prism.fullname" . }}-operator
{{- end -}}

{{/* Labels that select the operator's pods; they never change, because a Deployment's selector cannot. */}}
{{- define "prism.selectorLabels" -}}
app.kubernetes.io/name: prism-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "prism.labels" -}}
{{ include "prism.selectorLabels" . }}
app.kubernetes.io/component: operator
app.kubernetes.io/part-of: moe-prism
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "prism.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end -}}

{{/* The operator as a subject of a binding. */}}
{{- define "prism.subject" -}}
- kind: ServiceAccount
  name: {{ include "prism.operator" . }}
  namespace: {{ .Release.Namespace }}
{{- end -}}
