{{- define "tidegate.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "tidegate.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "tidegate.labels" -}}
{{ include "tidegate.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "tidegate.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ .Values.serviceAccount.name | default (include "tidegate.name" .) }}{{ else }}{{ .Values.serviceAccount.name | default "default" }}{{ end }}
{{- end }}

{{- define "tidegate.maxReplicas" -}}
{{- if eq .Values.autoscaling.kind "none" }}{{ .Values.replicas }}{{ else }}{{ .Values.autoscaling.maxReplicas }}{{ end }}
{{- end }}

{{- /* What would start and then be wrong is refused here, with what to do. */ -}}
{{- define "tidegate.check" -}}
{{- if .Values.settings.vllm }}
{{- fail "settings.vllm: vLLM's flags go into `flags`, one string each." }}
{{- end }}
{{- if and .Values.redis.deploy .Values.redis.url }}
{{- fail "redis.deploy and redis.url are both set: keep one." }}
{{- end }}
{{- if and (gt (int (include "tidegate.maxReplicas" .)) 1) (not (or .Values.redis.deploy .Values.redis.url .Values.secret)) }}
{{- fail "Several replicas share their limits through one Redis: set redis.url, or secret with the key tidegate_redis_url in it, or redis.deploy=true to try it out." }}
{{- end }}
{{- if and .Values.models.existingClaim .Values.models.hostPath }}
{{- fail "models.existingClaim and models.hostPath are both set: keep one." }}
{{- end }}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) }}
{{- fail "ingress.enabled needs ingress.host." }}
{{- end }}
{{- end }}
