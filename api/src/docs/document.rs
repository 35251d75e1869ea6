//! The OpenAPI document, put together from the table of routes, what is said about each of them, and the schemas.

use http::Method;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

use super::operations::{self, Body, Content, Operation};
use super::schemas;
use crate::files::SAFE_TYPES;
use crate::gate::Rule;
use crate::gate::limits::Policy;
use crate::routes::{self, Access};

/// Problems that every request can have: an address or headers that are too long, too many connections, a fault.
const ALWAYS: [u16; 5] = [405, 414, 431, 500, 503];
/// Those of requests with a key: two different keys, none, not this one, a parameter that isn't known, too many.
const KEYED: [u16; 5] = [400, 401, 403, 422, 429];
/// Those of requests with a body.
const WITH_BODY: [u16; 3] = [408, 413, 415];

const TAGS: [&str; 11] = [
    "jobs",
    "sessions",
    "templates",
    "tokens",
    "keys",
    "budgets",
    "usage",
    "audit",
    "webhooks",
    "queue",
    "health",
];

/// The document.
pub(super) fn document() -> Value {
    let mut paths = Map::new();
    for (path, access) in routes::named() {
        // The pages for people are no part of it.
        if path.starts_with("/docs") || path == "/redoc" {
            continue;
        }
        let mut item = Map::new();
        let rules = match access {
            Access::Keyed(rules) => rules
                .iter()
                .map(|rule| (rule.method.clone(), Some(rule)))
                .collect(),
            Access::Open => vec![(Method::GET, None)],
        };
        for (method, rule) in rules {
            if let Some(operation) = operations::find(&method, &path) {
                let name = method.as_str().to_ascii_lowercase();
                item.insert(name, operation_object(&operation, &path, rule));
            }
        }
        paths.insert(path, item.into());
    }
    let mut document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "claude-queue",
            "version": env!("CARGO_PKG_VERSION"),
            "summary": "A job queue in front of the Claude Code CLI",
            "description": "Clients must ignore members that they don't know: any release may add some. Statuses of jobs \
                            are a closed set; event types, holds and error codes are not.",
            "license": {"name": "MIT OR Apache-2.0", "identifier": "MIT OR Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"apiKey": []}, {"bearer": []}, {}],
        "tags": TAGS.map(|name| json!({"name": name})),
        "paths": paths,
        "components": {
            "securitySchemes": {
                "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "bearer": {"type": "http", "scheme": "bearer"},
            },
            "responses": problems(),
            "schemas": components(),
        },
    });
    let small = schemas::small().into_iter().collect::<Map<_, _>>();
    inline(&mut document, &small);
    document
}

/// The path of the document that an address is of: one without variables before one with them.
#[cfg(debug_assertions)]
pub(super) fn item<'d>(document: &'d Value, address: &str) -> Option<(&'d String, &'d Value)> {
    let parts = address.trim_end_matches('/').split('/').collect::<Vec<_>>();
    let fits = |path: &str| {
        let known = path.split('/').collect::<Vec<_>>();
        let rest = path.ends_with("/files/{path}") && parts.len() > known.len();
        let pairs = known.iter().zip(&parts);
        (known.len() == parts.len() || rest)
            && pairs
                .into_iter()
                .all(|(known, part)| known == part || known.starts_with('{'))
    };
    let paths = document["paths"].as_object()?;
    paths
        .iter()
        .filter(|(path, _)| fits(path))
        .min_by_key(|(path, _)| path.matches('{').count())
}

fn operation_object(operation: &Operation, path: &str, rule: Option<&Rule>) -> Value {
    let mut answers = Map::new();
    for (status, content) in operation.answers {
        answers.insert(status.to_string(), answer(*status, *content, rule));
    }
    let mut problems = BTreeSet::from(ALWAYS);
    problems.extend(operation.problems);
    if rule.is_some() {
        problems.extend(KEYED);
    }
    if path.contains('{') {
        problems.insert(404);
    }
    if !matches!(operation.body, Body::None) {
        problems.extend(WITH_BODY);
    }
    for status in problems {
        let reference = json!({"$ref": format!("#/components/responses/Problem{status}")});
        answers.insert(status.to_string(), reference);
    }
    let tag = match path.strip_prefix("/api/v1/") {
        Some(rest) if rest != "health" => rest.split('/').next().unwrap_or_default(),
        _ => "health",
    };
    let mut object = json!({
        "operationId": operation.id,
        "summary": operation.summary,
        "tags": [tag],
        "parameters": parameters(operation, path, rule),
        "responses": answers,
    });
    match rule {
        None => object["security"] = json!([]),
        Some(rule) => {
            if let Some(scope) = rule.scope {
                object["description"] = format!("Needs the scope `{scope}`.").into();
            }
        }
    }
    if let Some(body) = body(operation.body) {
        object["requestBody"] = body;
    }
    object
}

fn body(body: Body) -> Option<Value> {
    let json_body = |name: &str, required: bool| json!({"required": required, "content": {"application/json": {"schema": reference(name)}}});
    match body {
        Body::None => None,
        Body::Json(name) => Some(json_body(name, true)),
        Body::Optional(name) => Some(json_body(name, false)),
        Body::File => Some(json!({
            "required": true,
            "content": {"multipart/form-data": {"schema": {
                "type": "object",
                "properties": {
                    "file": {"type": "string", "contentMediaType": "application/octet-stream", "format": "binary",
                        "description": "At most 10 MiB, stored under its file name."},
                    "path": {"type": "string", "maxLength": 1024,
                        "description": "Where it is stored; a directory if it ends in a slash. Not together with the query's `path`."},
                },
                "required": ["file"],
            }}},
        })),
    }
}

fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

fn envelope(data: &Value, pagination: Option<&str>) -> Value {
    let mut schema = json!({
        "type": "object",
        "properties": {"data": data, "meta": reference("Meta")},
        "required": ["data", "meta"],
    });
    if let Some(name) = pagination {
        schema["properties"]["pagination"] = reference(name);
        schema["required"] = json!(["data", "meta", "pagination"]);
    }
    schema
}

fn answer(status: u16, content: Content, rule: Option<&Rule>) -> Value {
    let list = |name: &str| json!({"type": "array", "items": reference(name)});
    let json_content = |schema: Value| json!({"application/json": {"schema": schema}});
    let text = json!({"schema": {"type": "string"}});
    let events = envelope(&list("Event"), Some("EventPages"));
    let content = match content {
        Content::Data(name) => json_content(envelope(&reference(name), None)),
        Content::List(name, pagination) => json_content(envelope(&list(name), Some(pagination))),
        Content::All(name) => json_content(envelope(&list(name), None)),
        Content::Bare("Document") => json_content(json!({"type": "object"})),
        Content::Bare(name) => json_content(reference(name)),
        Content::Bytes => {
            let types = SAFE_TYPES.iter().map(|(_, content_type)| *content_type);
            let types = types.chain(["application/octet-stream"]);
            let bytes = json!({"schema": {"type": "string", "format": "binary"}});
            // Without their parameters.
            let types = types.map(|name| name.split(';').next().unwrap_or_default().to_owned());
            types
                .map(|name| (name, bytes.clone()))
                .collect::<Map<_, _>>()
                .into()
        }
        Content::Text => json!({"text/plain": text}),
        // No version 3.1 of OpenAPI can say what an event has; readers differ in whether a schema is of one or of all.
        Content::Events => json!({"text/event-stream": {}}),
        Content::EventsOrList => {
            json!({"application/json": {"schema": events}, "text/event-stream": {}})
        }
        Content::ResultOrText => {
            json!({"application/json": {"schema": reference("Result")}, "text/plain": text})
        }
        Content::Ledger => {
            let rows = envelope(&list("LedgerRow"), Some("Pagination"));
            json!({"application/json": {"schema": rows}, "text/csv": text})
        }
        Content::Empty => Value::Null,
    };
    let mut answer = json!({
        "description": description(status),
        "headers": headers(status, rule),
    });
    if !content.is_null() {
        answer["content"] = content;
    }
    answer
}

/// The headers that matter to a client.
fn headers(status: u16, rule: Option<&Rule>) -> Value {
    let mut headers = Map::new();
    let mut add = |name: &str, what: &str, kind: &str| {
        headers.insert(
            name.to_owned(),
            json!({"description": what, "schema": {"type": kind}}),
        );
    };
    add("X-Request-ID", "The id of the request", "string");
    if let Some(rule) = rule {
        for (name, what) in [
            ("X-RateLimit-Limit", "The limit"),
            ("X-RateLimit-Remaining", "Requests left"),
            ("X-RateLimit-Used", "Requests used"),
            ("X-RateLimit-Reset", "Unix time at which the limit is full again"),
        ] {
            add(name, what, "integer");
        }
        if rule.policy == Policy::Submit {
            add(
                "X-Budget-Limit",
                "The budget in dollars, where there is one",
                "number",
            );
            add("X-Budget-Remaining", "What is left of it", "number");
            add("X-Job-Id", "The id of the job", "string");
        }
    }
    match status {
        201 | 202 => add("Location", "Where it is found", "string"),
        206 => add("Content-Range", "Which part this is", "string"),
        _ => {}
    }
    headers.into()
}

fn description(status: u16) -> &'static str {
    match status {
        200 => "Done",
        201 => "Created",
        202 => "Accepted: it goes on after this answer",
        204 => "Done; there is nothing to say",
        206 => "The part that was asked for",
        304 => "Not changed",
        400 => "The request makes no sense as a whole: a path, a cursor, a name, two different keys",
        401 => "No key, or one that is not valid",
        403 => "The key may not do this",
        404 => "There is no such thing, or it belongs to another key",
        405 => "The path has no such method",
        406 => "None of the accepted types can be sent",
        408 => "The request did not arrive in time",
        409 => "It conflicts with how things are",
        410 => "The data was removed",
        412 => "A precondition is not met",
        413 => "The body is too large",
        414 => "The path and query are too long",
        415 => "The body is not of the right type, or compressed",
        416 => "The file has no byte of the range",
        422 => "Members of the body or the query are not valid; `errors` names all of them",
        429 => "Too often, too many, or over budget",
        431 => "The headers are too large",
        500 => "A fault of the service",
        502 => "Claude, or what it needs, has failed",
        504 => "The time of the run was used up",
        503 => "Not now; `Retry-After` says when to try again where that is known",
        _ => "",
    }
}

fn problems() -> Value {
    let statuses = [
        400, 401, 403, 404, 405, 406, 408, 409, 410, 412, 413, 414, 415, 416, 422, 429, 431, 500, 502, 503,
        504,
    ];
    let problem = |status: u16| {
        let mut headers = json!({"X-Request-ID": {"schema": {"type": "string"}}});
        if matches!(status, 429 | 503) {
            headers["Retry-After"] = json!({"description": "In seconds", "schema": {"type": "integer"}});
        }
        if status == 405 {
            headers["Allow"] =
                json!({"description": "The methods of the path", "schema": {"type": "string"}});
        }
        if status == 401 {
            headers["WWW-Authenticate"] = json!({"schema": {"type": "string"}});
        }
        json!({
            "description": description(status),
            "headers": headers,
            "content": {"application/problem+json": {"schema": reference("Problem")}},
        })
    };
    let problems = statuses.map(|status| (format!("Problem{status}"), problem(status)));
    problems.into_iter().collect::<Map<_, _>>().into()
}

fn components() -> Value {
    let mut components = Map::new();
    for (name, mut schema, request) in schemas::all() {
        let members = schema["properties"]
            .as_object()
            .map(|members| members.keys().cloned().collect::<Vec<_>>())
            .unwrap_or_default();
        if request {
            schema["additionalProperties"] = false.into();
        } else {
            let optional = schemas::OPTIONAL.iter().find(|(known, _)| *known == name);
            let optional = optional.map_or(&[][..], |(_, optional)| *optional);
            let always = members
                .iter()
                .filter(|member| !optional.contains(&member.as_str()));
            schema["required"] = always.cloned().collect::<Vec<_>>().into();
        }
        components.insert(name, schema);
    }
    components.into()
}

/// Puts the small schemas where they are used: generators make better types of them. What may be null says so by its
/// type.
fn inline(value: &mut Value, small: &Map<String, Value>) {
    match value {
        Value::Array(values) => values.iter_mut().for_each(|value| inline(value, small)),
        Value::Object(members) => {
            members.values_mut().for_each(|value| inline(value, small));
            if let Some(schema) = members
                .get("$ref")
                .and_then(Value::as_str)
                .and_then(|reference| reference.rsplit('/').next())
                .and_then(|name| small.get(name))
            {
                let described = members.remove("description");
                *value = schema.clone();
                if let Some(described) = described {
                    value["description"] = described;
                }
                return;
            }
            let Some(Value::Array(choices)) = members.get("oneOf") else {
                return;
            };
            let (null, other) = match choices.as_slice() {
                [null, other] if null["type"] == "null" => (null, other),
                [other, null] => (null, other),
                _ => return,
            };
            if null["type"] != "null" || !other["type"].is_string() {
                return;
            }
            let mut schema = other.clone();
            let described = members.remove("description");
            schema["type"] = json!([schema["type"], "null"]);
            if let Some(Value::Array(words)) = schema.get_mut("enum") {
                words.push(Value::Null);
            }
            if let Some(described) = described {
                schema["description"] = described;
            }
            *value = schema;
        }
        _ => {}
    }
}

/// The variables of the path, the query's parameters, and the headers that the operation understands.
fn parameters(operation: &Operation, path: &str, rule: Option<&Rule>) -> Vec<Value> {
    let variables = path
        .split('/')
        .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    let mut parameters = variables
        .map(|name| {
            let (what, schema) = variable(path, name);
            json!({"name": name, "in": "path", "required": true, "description": what, "schema": schema})
        })
        .collect::<Vec<_>>();
    let Some(rule) = rule else { return parameters };
    for name in rule.query {
        if let Some((what, schema)) = query(path, name) {
            parameters.push(json!({"name": name, "in": "query", "description": what, "schema": schema}));
        }
    }
    let mut header = |name: &str, what: &str, schema: Value| {
        parameters.push(json!({"name": name, "in": "header", "description": what, "schema": schema}));
    };
    if rule.policy == Policy::Submit || matches!(operation.id, "createKey" | "adjustBudget" | "rotateKey") {
        let key = json!({"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"});
        header(
            "Idempotency-Key",
            "A repeated request with the same key gets the first answer",
            key,
        );
    }
    if rule.policy == Policy::Submit || operation.id == "getJob" {
        header(
            "Prefer",
            "`wait=N`: how many seconds to wait for the end",
            json!({"type": "string"}),
        );
    }
    if rule.policy == Policy::Submit {
        header("Cancel-After", "`30s`, `5m`, `1h`", json!({"type": "string"}));
    }
    if operation.answers.iter().any(|(status, _)| *status == 304) {
        header(
            "If-None-Match",
            "The `ETag` that the client has",
            json!({"type": "string"}),
        );
    }
    if operation.answers.iter().any(|(status, _)| *status == 206) {
        header("Range", "`bytes=0-99`", json!({"type": "string"}));
    }
    if operation.problems.contains(&412) && !operation.id.starts_with("rotate") {
        let name = if operation.id == "createSession" {
            "If-None-Match"
        } else {
            "If-Match"
        };
        header(
            name,
            "The state that the change is meant for",
            json!({"type": "string"}),
        );
    }
    if matches!(operation.id, "listEvents" | "streamEvents") {
        header(
            "Last-Event-ID",
            "The last event that the client has",
            json!({"type": "string"}),
        );
    }
    parameters
}

/// A variable of a path.
fn variable(path: &str, name: &str) -> (&'static str, Value) {
    match (
        path.strip_prefix("/api/v1/")
            .unwrap_or_default()
            .split('/')
            .next(),
        name,
    ) {
        (Some("jobs"), "id") => ("The id of the job", json!({"type": "string", "maxLength": 64})),
        (Some("sessions"), "name") => (
            "The session's name, number or Claude id",
            json!({"type": "string", "minLength": 1, "maxLength": 128}),
        ),
        (_, "path") => (
            "The path of the file; slashes may stand as they are",
            json!({"type": "string", "minLength": 1, "maxLength": 1024}),
        ),
        (Some("templates"), "name") => (
            "The name of the template",
            json!({"type": "string", "minLength": 1, "maxLength": 128}),
        ),
        (_, "scope") => (
            "What the budget limits",
            json!({"type": "string", "enum": ["key", "global"]}),
        ),
        _ => (
            "The id",
            json!({"type": "string", "minLength": 1, "maxLength": 128}),
        ),
    }
}

/// A parameter of a query; `None` if nobody has said what it is.
pub(super) fn query(path: &str, name: &str) -> Option<(&'static str, Value)> {
    let text = |limit: usize| json!({"type": "string", "maxLength": limit});
    let time = || json!({"type": "string", "format": "date-time"});
    let whole = |low: i64, high: i64| json!({"type": "integer", "minimum": low, "maximum": high});
    let words = |words: &[&str]| json!({"type": "string", "enum": words});
    let files = path.ends_with("/files");
    Some(match name {
        "limit" if path.ends_with("/events") => ("How many at most", whole(1, 1_000)),
        "limit" if path.ends_with("/history") => ("How many at most", whole(1, 1_000)),
        "cancel_on_disconnect" => (
            "Whether the job is cancelled when the client leaves",
            words(&["true", "false"]),
        ),
        "limit" if path.ends_with("/ledger") => ("How many at most", whole(1, 1_000)),
        "limit" if path.starts_with("/api/v1/sessions/") && path.ends_with("/jobs") => {
            ("How many at most", whole(1, 1_000))
        }
        "limit" if path.ends_with("/audit") => ("How many at most", whole(1, 200)),
        "limit" => ("How many at most", whole(1, 100)),
        "page" => ("Which page, from 1", json!({"type": "integer", "minimum": 1})),
        "cursor" => ("`next_cursor` of the page before", text(1_024)),
        "view" => ("How much is shown", words(&["basic", "full"])),
        "fields" => (
            "Which members of a job are shown, with commas between them",
            text(1_024),
        ),
        "status" if path.ends_with("/jobs") => ("Statuses, with commas between them", text(128)),
        "status" if path.ends_with("/keys") => ("Only those", words(&["active", "revoked", "expired"])),
        "status" => (
            "Only those",
            words(&["pending", "succeeded", "failed", "cancelled"]),
        ),
        "kind" if path.ends_with("/audit") => ("Which entries", words(&["messages", "admin"])),
        "kind" => ("Which jobs", words(&["job", "chat", "all"])),
        "order" => ("By creation", words(&["desc", "asc"])),
        "session" => ("Only those of this session", text(128)),
        "batch_id" => ("There are no batches yet", text(64)),
        "custom_id" => (
            "Only those with this name of yours",
            json!({"type": "string", "minLength": 1, "maxLength": 64}),
        ),
        "key_id" => ("Only those of this key; administrators only", text(128)),
        "user_id" => ("Only those of this key; administrators only", text(128)),
        "created_after" => ("Only younger ones", time()),
        "created_before" => ("Only older ones", time()),
        "wait" => ("How many seconds to wait for a change", whole(0, 300)),
        "after" | "starting_after" => ("Only events after this number", whole(0, i64::MAX)),
        "path" if files => ("A directory; the workspace itself if absent", text(1_024)),
        "recursive" => (
            "Whether what is below it is listed, too",
            words(&["true", "false"]),
        ),
        "name" => ("Only those with this name", text(128)),
        "group_by" => ("Sums by this", words(&["none", "day", "key", "model", "session"])),
        "from" => ("From this time", time()),
        "to" => ("Before this time", time()),
        "before" => ("Only entries before this number", whole(1, i64::MAX)),
        "job_id" => ("Only those of this job", text(64)),
        "endpoint_id" => ("Only those to this endpoint", text(64)),
        "event_type" => ("Only those of this type", text(64)),
        "include" => ("`body`: what is sent, too", words(&["body"])),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every path, method, variable and parameter of the table of routes is described.
    #[test]
    fn nothing_of_the_routes_is_missing() {
        let document = document();
        let mut missing = Vec::new();
        for (path, access) in routes::named() {
            if path.starts_with("/docs") || path == "/redoc" {
                continue;
            }
            let item = &document["paths"][&path];
            let methods = match access {
                Access::Keyed(rules) => rules.iter().map(|rule| (&rule.method, rule.query)).collect(),
                Access::Open => vec![(&Method::GET, &[][..])],
            };
            for (method, names) in methods {
                let operation = &item[method.as_str().to_ascii_lowercase()];
                if operation.is_null() {
                    missing.push(format!("{method} {path}: add a line to docs/operations.rs"));
                }
                for name in names {
                    if query(&path, name).is_none() {
                        missing.push(format!(
                            "{method} {path}?{name}: add it to `query` in docs/document.rs"
                        ));
                    }
                }
                for variable in path
                    .split('/')
                    .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
                {
                    let parameters = operation["parameters"].as_array().into_iter().flatten();
                    let found = parameters.filter(|found| found["in"] == "path" && found["name"] == variable);
                    assert_eq!(found.count(), 1, "{method} {path}: {variable}");
                }
            }
        }
        assert!(
            missing.is_empty(),
            "not in the OpenAPI document:\n{}",
            missing.join("\n")
        );
    }

    /// Every reference leads somewhere, and names of operations are unique.
    #[test]
    fn the_document_is_closed() {
        fn references(value: &Value, found: &mut BTreeSet<String>) {
            match value {
                Value::Array(values) => values.iter().for_each(|value| references(value, found)),
                Value::Object(members) => {
                    if let Some(Value::String(reference)) = members.get("$ref") {
                        found.insert(reference.clone());
                    }
                    members.values().for_each(|value| references(value, found));
                }
                _ => {}
            }
        }
        let document = document();
        let mut found = BTreeSet::new();
        references(&document, &mut found);
        for reference in found {
            let pointer = reference.strip_prefix('#').unwrap();
            assert!(document.pointer(pointer).is_some(), "{reference}");
        }
        let paths = document["paths"].as_object().unwrap();
        let operations = paths.values().flat_map(|item| item.as_object().unwrap().values());
        let mut names = operations
            .map(|operation| operation["operationId"].to_string())
            .collect::<Vec<_>>();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    /// What is read of a request, and what is shown of a job, is what the document says.
    #[test]
    fn the_members_of_requests_are_those_that_are_read() {
        let document = document();
        for (schema, members) in [
            ("JobCreate", crate::jobs::submit::MEMBERS),
            ("SessionCreate", crate::sessions::MEMBERS),
            ("Job", crate::jobs::view::JobView::MEMBERS),
        ] {
            let described = document["components"]["schemas"][schema]["properties"]
                .as_object()
                .unwrap();
            let described = described.keys().map(String::as_str).collect::<BTreeSet<_>>();
            let members = members.iter().copied().collect::<BTreeSet<_>>();
            assert_eq!(described, members, "{schema} in docs/schemas.rs");
        }
    }
}
