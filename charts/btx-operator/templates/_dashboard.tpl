{{/*
One dashboard as Grafana's JSON. Argument: a file of files/dashboards: uid, title, description,
variables (name: query), rows (title, panels), a panel being title, description, unit, type
(timeseries unless said), stack, and queries (legend: PromQL). Two panels stand side by side.
*/}}
{{- define "btx-operator.dashboard" -}}
{{- $source := dict "type" "prometheus" "uid" "${datasource}" -}}
{{- $variables := list (dict "name" "datasource" "label" "Data source" "type" "datasource" "query" "prometheus") -}}
{{- range .variables -}}
{{- $variable := dict "name" .name "label" .label "type" "query" "datasource" $source "refresh" 2 "sort" 1 "query" (dict "query" .query "refId" .name) -}}
{{- if .all -}}
{{- $variable = merge $variable (dict "includeAll" true "multi" true "allValue" ".+" "current" (dict "text" "All" "value" "$__all")) -}}
{{- end -}}
{{- $variables = append $variables $variable -}}
{{- end -}}
{{- $panels := list -}}
{{- $id := 1 -}}
{{- $y := 0 -}}
{{- range .rows -}}
{{- $panels = append $panels (dict "id" $id "type" "row" "title" .title "collapsed" false "panels" list "gridPos" (dict "x" 0 "y" $y "w" 24 "h" 1)) -}}
{{- $id = add $id 1 -}}
{{- $y = add $y 1 -}}
{{- range $i, $panel := .panels -}}
{{- $targets := list -}}
{{- range $panel.queries -}}
{{- $targets = append $targets (dict "refId" (printf "%c" (add 65 (len $targets) | int)) "datasource" $source "expr" .expr "legendFormat" .legend) -}}
{{- end -}}
{{- $custom := dict "fillOpacity" (ternary 30 0 (default false $panel.stack)) "stacking" (dict "mode" (ternary "normal" "none" (default false $panel.stack))) -}}
{{- $panels = append $panels (dict
      "id" $id "type" (default "timeseries" $panel.type) "title" $panel.title
      "description" $panel.description "datasource" $source "targets" $targets
      "gridPos" (dict "x" (mul 12 (mod $i 2)) "y" (add $y (mul 8 (div $i 2))) "w" 12 "h" 8)
      "fieldConfig" (dict "overrides" list "defaults" (dict "unit" (default "short" $panel.unit) "custom" $custom))
    ) -}}
{{- $id = add $id 1 -}}
{{- end -}}
{{- $y = add $y (mul 8 (div (add 1 (len .panels)) 2)) -}}
{{- end -}}
{{- dict
      "uid" .uid "title" .title "description" .description "tags" (list "btx") "schemaVersion" 39
      "editable" true "refresh" "30s" "time" (dict "from" "now-6h" "to" "now")
      "templating" (dict "list" $variables) "annotations" (dict "list" list) "panels" $panels
    | toPrettyJson -}}
{{- end -}}
