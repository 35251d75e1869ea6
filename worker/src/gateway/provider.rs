//! A request of the Messages API in the form of a cloud's, after that cloud's documentation.

use bytes::Bytes;
use http::header::{HeaderMap, HeaderValue};
use serde_json::{Value, json};

use crate::config::provider::{Kind, Provider};

const BETA: &str = "anthropic-beta";

/// The version that Vertex wants in the body.
const VERTEX_VERSION: &str = "vertex-2023-10-16";

/// The betas that Bedrock and Vertex are sent: those that the CLI itself sends to them. They refuse a request with one
/// that they don't know.
const CLOUD_BETAS: [&str; 6] = [
    "claude-code-20250219",
    "context-1m-2025-08-07",
    "context-management-2025-06-27",
    "interleaved-thinking-2025-05-14",
    "tool-search-tool-2025-10-19",
    "web-search-2025-03-05",
];

/// A request as the CLI made it.
pub(super) struct Asked<'a> {
    /// `/v1/messages` or `/v1/messages/count_tokens`.
    pub(super) path: &'a str,
    /// What follows the question mark.
    pub(super) query: Option<&'a str>,
    /// The body.
    pub(super) body: &'a Bytes,
}

impl Provider {
    /// Whether requests have to be changed.
    pub(super) fn rewrites(&self) -> bool {
        !self.models.is_empty() || !matches!(self.kind, Kind::Anthropic | Kind::Foundry)
    }

    /// The path with its query, and the body, as the provider wants them. A body that isn't an object stays as it is:
    /// the provider refuses it.
    pub(super) fn rewrite(&self, asked: &Asked<'_>) -> (String, Bytes) {
        let query = asked.query.map(|query| format!("?{query}")).unwrap_or_default();
        let same = || (format!("{}{query}", asked.path), asked.body.clone());
        let Ok(Value::Object(mut body)) = serde_json::from_slice(asked.body) else {
            return same();
        };
        let Some(model) = body.get("model").and_then(Value::as_str) else {
            return same();
        };
        let model = self.model(model);
        let written = |body: serde_json::Map<String, Value>| Bytes::from(Value::Object(body).to_string());
        let Kind::Vertex { project, region } = &self.kind else {
            body.insert("model".to_owned(), json!(model));
            return (format!("{}{query}", asked.path), written(body));
        };
        let models = format!("/v1/projects/{project}/locations/{region}/publishers/anthropic/models");
        body.insert("anthropic_version".to_owned(), json!(VERTEX_VERSION));
        if asked.path.ends_with("/count_tokens") {
            body.insert("model".to_owned(), json!(model));
            return (format!("{models}/count-tokens:rawPredict"), written(body));
        }
        body.remove("model");
        let how = if body.get("stream") == Some(&Value::Bool(true)) {
            "streamRawPredict"
        } else {
            "rawPredict"
        };
        // A model's name comes from the run: it may not lead to another path.
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.@".contains(c);
        let model: String = model.chars().filter(|c| plain(*c)).collect();
        (format!("{models}/{model}:{how}"), written(body))
    }

    /// Leaves out what the provider refuses.
    pub(super) fn fit(&self, headers: &mut HeaderMap) {
        if matches!(self.kind, Kind::Vertex { .. }) {
            // It wants the version in the body.
            headers.remove("anthropic-version");
        }
        if self.kind.takes_all_betas() {
            return;
        }
        let given: Vec<HeaderValue> = headers.get_all(BETA).iter().cloned().collect();
        let given = given.iter().filter_map(|value| value.to_str().ok());
        let kept: Vec<&str> = given
            .flat_map(|value| value.split(',').map(str::trim))
            .filter(|beta| CLOUD_BETAS.contains(beta))
            .collect();
        match HeaderValue::try_from(kept.join(",")) {
            Ok(value) if !kept.is_empty() => drop(headers.insert(BETA, value)),
            _ => drop(headers.remove(BETA)),
        }
    }

    /// The provider's name for a model.
    fn model(&self, model: &str) -> String {
        // The size of the context window is the CLI's own addition.
        let model = model.strip_suffix("[1m]").unwrap_or(model);
        if let Some(id) = self.models.get(model) {
            return id.clone();
        }
        match &self.kind {
            Kind::Anthropic | Kind::Foundry => model.to_owned(),
            Kind::Bedrock if model.contains("anthropic.") => model.to_owned(),
            Kind::Bedrock => format!("anthropic.{model}"),
            Kind::Vertex { .. } => dated(model),
        }
    }
}

/// `claude-x-20250929` is `claude-x@20250929` there.
fn dated(model: &str) -> String {
    match model.rsplit_once('-') {
        Some((name, date)) if date.len() == 8 && date.bytes().all(|byte| byte.is_ascii_digit()) => {
            format!("{name}@{date}")
        }
        _ => model.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use http::Uri;
    use shared::env::Vars;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;
    use crate::config::{Anthropic, Config};
    use crate::gateway::credentials::Credentials;
    use crate::gateway::question::Answer;
    use crate::gateway::upstream::Upstream;

    /// A server on loopback that answers one request after the other with this, and gives what it was sent.
    async fn server(answer: &'static str) -> (String, tokio::sync::mpsc::UnboundedReceiver<String>) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, requests) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut all = String::new();
                let mut buffer = [0; 4096];
                while !is_whole(&all) {
                    let read = stream.read(&mut buffer).await.unwrap();
                    all.push_str(std::str::from_utf8(&buffer[..read]).unwrap());
                }
                sender.send(all).unwrap();
                let head = format!("content-length: {}\r\nconnection: close\r\n\r\n", answer.len());
                let answer = format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n{head}{answer}");
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        (format!("http://{address}"), requests)
    }

    fn is_whole(request: &str) -> bool {
        let Some((head, body)) = request.split_once("\r\n\r\n") else {
            return false;
        };
        let head = head.to_lowercase();
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "));
        length.map_or(0, |length| length.parse().unwrap()) <= body.len()
    }

    fn settings<const N: usize>(vars: [(&str, &str); N]) -> (Anthropic, Credentials, Upstream) {
        let settings = Config::from_vars(&Vars::of(vars)).unwrap().anthropic;
        let credentials = Credentials::find(&settings, "/nonexistent".as_ref()).unwrap();
        let upstream = Upstream::new(&settings.base_url).unwrap().of(&settings.provider);
        (settings, credentials, upstream)
    }

    /// What a request of a run is sent as: first line, head, body.
    async fn sent<const N: usize>(
        vars: [(&str, &str); N],
        requests: &mut tokio::sync::mpsc::UnboundedReceiver<String>,
        path: &'static str,
        body: &Value,
    ) -> (String, String, Value) {
        let (_, credentials, upstream) = settings(vars);
        let mut headers = HeaderMap::new();
        headers.insert("anthropic-version", "2023-06-01".parse().unwrap());
        headers.insert("content-type", "application/json".parse().unwrap());
        let betas = "claude-code-20250219, cache-diagnosis-2026-04-07";
        headers.insert(BETA, betas.parse().unwrap());
        let (name, value) = credentials.header().await.unwrap();
        headers.insert(name, value);
        let response = upstream
            .post(&Uri::from_static(path), headers, body.to_string().into())
            .await;
        assert_eq!(response.unwrap().status(), 200);
        let mut request = requests.recv().await.unwrap();
        if request.contains("/v1/oauth/token") {
            request = requests.recv().await.unwrap();
        }
        let (head, body) = request.split_once("\r\n\r\n").unwrap();
        let (line, head) = head.split_once("\r\n").unwrap();
        (
            line.to_owned(),
            head.to_lowercase(),
            serde_json::from_str(body).unwrap(),
        )
    }

    fn asked() -> Value {
        json!({"model": "claude-sonnet-5", "max_tokens": 9, "stream": true, "messages": []})
    }

    #[tokio::test]
    async fn foundry_gets_its_key_and_the_request_as_it_is() {
        let (url, mut requests) = server("{}").await;
        let base = format!("{url}/anthropic/");
        let vars = [
            ("CLAUDE_CODE_USE_FOUNDRY", "1"),
            ("ANTHROPIC_FOUNDRY_BASE_URL", base.as_str()),
            ("ANTHROPIC_FOUNDRY_API_KEY", "foundry-key"),
        ];

        let (line, head, body) = sent(vars, &mut requests, "/v1/messages?beta=true", &asked()).await;

        assert_eq!(line, "POST /anthropic/v1/messages?beta=true HTTP/1.1");
        assert!(
            head.contains("api-key: foundry-key") && !head.contains("authorization"),
            "{head}"
        );
        assert!(head.contains("anthropic-version: 2023-06-01"), "{head}");
        assert!(
            head.contains("claude-code-20250219, cache-diagnosis-2026-04-07"),
            "{head}"
        );
        assert_eq!(body, asked());
    }

    #[tokio::test]
    async fn bedrock_gets_a_bearer_key_and_its_own_name_of_the_model() {
        let (url, mut requests) = server("{}").await;
        let base = format!("{url}/anthropic");
        let vars = [
            ("CLAUDE_CODE_USE_BEDROCK", "1"),
            ("ANTHROPIC_BEDROCK_BASE_URL", base.as_str()),
            ("AWS_BEARER_TOKEN_BEDROCK", "bedrock-key"),
            ("PROVIDER_MODEL_IDS", "claude-opus-5=us.anthropic.claude-opus-5"),
        ];

        let (line, head, body) = sent(vars, &mut requests, "/v1/messages", &asked()).await;
        assert_eq!(line, "POST /anthropic/v1/messages HTTP/1.1");
        assert!(head.contains("authorization: bearer bedrock-key"), "{head}");
        assert!(
            head.contains("anthropic-beta: claude-code-20250219\r\n"),
            "{head}"
        );
        assert_eq!(body["model"], "anthropic.claude-sonnet-5");
        assert_eq!(body["max_tokens"], 9);

        for (model, id) in [
            ("claude-opus-5", "us.anthropic.claude-opus-5"),
            ("claude-opus-5[1m]", "us.anthropic.claude-opus-5"),
            ("eu.anthropic.claude-x", "eu.anthropic.claude-x"),
        ] {
            let asked = json!({"model": model, "messages": []});
            let (.., body) = sent(vars, &mut requests, "/v1/messages", &asked).await;
            assert_eq!(body["model"], id);
        }
    }

    #[tokio::test]
    async fn vertex_gets_the_model_in_the_path_and_the_version_in_the_body() {
        let (url, mut requests) = server("{}").await;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        std::fs::write(&file, "ya29.first\n").unwrap();
        let vars = [
            ("CLAUDE_CODE_USE_VERTEX", "1"),
            ("ANTHROPIC_VERTEX_BASE_URL", url.as_str()),
            ("ANTHROPIC_VERTEX_PROJECT_ID", "p-1"),
            ("CLOUD_ML_REGION", "us-east5"),
            ("GOOGLE_ACCESS_TOKEN_FILE", file.to_str().unwrap()),
        ];
        let models = "POST /v1/projects/p-1/locations/us-east5/publishers/anthropic/models";

        let (line, head, body) = sent(vars, &mut requests, "/v1/messages?beta=true", &asked()).await;
        assert_eq!(
            line,
            format!("{models}/claude-sonnet-5:streamRawPredict HTTP/1.1")
        );
        assert!(
            head.contains("authorization: bearer ya29.first") && !head.contains("anthropic-version"),
            "{head}"
        );
        assert!(
            head.contains("anthropic-beta: claude-code-20250219\r\n"),
            "{head}"
        );
        assert_eq!(
            body,
            json!({"anthropic_version": "vertex-2023-10-16", "max_tokens": 9, "stream": true, "messages": []})
        );

        std::fs::write(&file, "ya29.second").unwrap();
        let once = json!({"model": "claude-haiku-4-5-20251001", "messages": []});
        let (line, head, _) = sent(vars, &mut requests, "/v1/messages", &once).await;
        assert_eq!(
            line,
            format!("{models}/claude-haiku-4-5@20251001:rawPredict HTTP/1.1")
        );
        assert!(
            head.contains("bearer ya29.second"),
            "the file is read again: {head}"
        );
        let (line, _, body) = sent(vars, &mut requests, "/v1/messages/count_tokens", &asked()).await;
        assert_eq!(line, format!("{models}/count-tokens:rawPredict HTTP/1.1"));
        assert_eq!(body["model"], "claude-sonnet-5");

        let elsewhere = json!({"model": "../../x?y#z", "messages": []});
        let (line, ..) = sent(vars, &mut requests, "/v1/messages", &elsewhere).await;
        assert_eq!(line, format!("{models}/....xyz:rawPredict HTTP/1.1"));
    }

    #[tokio::test]
    async fn a_gateway_of_the_operators_own_gets_a_bearer_token() {
        let (url, mut requests) = server("{}").await;
        let base = format!("{url}/llm/v1");
        let vars = [
            ("ANTHROPIC_BASE_URL", base.as_str()),
            ("ANTHROPIC_AUTH_TOKEN", "own-token"),
        ];

        let (line, head, body) = sent(vars, &mut requests, "/v1/messages?beta=true", &asked()).await;

        assert_eq!(line, "POST /llm/v1/messages?beta=true HTTP/1.1");
        assert!(head.contains("authorization: bearer own-token"), "{head}");
        assert_eq!(body, asked());
    }

    #[tokio::test]
    async fn the_identity_of_a_pod_is_exchanged_for_a_short_token() {
        let granted = r#"{"access_token":"sk-ant-oat01-short","token_type":"Bearer","expires_in":600}"#;
        let (url, mut requests) = server(granted).await;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("jwt");
        std::fs::write(&file, "a.b.c\n").unwrap();
        let (_, credentials, upstream) = settings([
            ("ANTHROPIC_BASE_URL", url.as_str()),
            ("ANTHROPIC_IDENTITY_TOKEN_FILE", file.to_str().unwrap()),
            ("ANTHROPIC_FEDERATION_RULE_ID", "fdrl_1"),
            ("ANTHROPIC_ORGANIZATION_ID", "org-1"),
            ("ANTHROPIC_SERVICE_ACCOUNT_ID", "svac_1"),
        ]);

        let header = credentials.header().await.unwrap();
        let again = credentials.header().await.unwrap();

        assert_eq!(header.1.to_str().unwrap(), "Bearer sk-ant-oat01-short");
        assert_eq!(header, again);
        let request = requests.recv().await.unwrap();
        assert!(
            request.starts_with("POST /v1/oauth/token HTTP/1.1\r\n"),
            "{request}"
        );
        assert!(
            request.contains("anthropic-beta: oauth-2025-04-20,oidc-federation-2026-04-01"),
            "{request}"
        );
        let body: Value = serde_json::from_str(request.split_once("\r\n\r\n").unwrap().1).unwrap();
        assert_eq!(
            body,
            json!({
                "grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer", "assertion": "a.b.c",
                "federation_rule_id": "fdrl_1", "organization_id": "org-1", "service_account_id": "svac_1",
            })
        );
        assert!(requests.try_recv().is_err(), "exchanged once");

        assert_eq!(upstream.ask(&credentials).await, Answer::Good);
        let question = requests.recv().await.unwrap();
        assert!(
            question.starts_with("GET /v1/models?limit=1 HTTP/1.1\r\n"),
            "{question}"
        );
        assert!(
            question.contains("anthropic-beta: oauth-2025-04-20"),
            "{question}"
        );
    }
}
