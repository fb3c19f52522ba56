//! What the API asks of the daemon.

use super::{Daemon, Job};
use crate::{
    api::{ConnectionFilter, Control, Failure, Reply, types},
    dataplane::Maps,
    model::Admin,
};
use std::path::PathBuf;
use tokio::sync::{mpsc, oneshot};

/// Carries requests to the daemon's task.
pub(super) struct Handle {
    jobs: mpsc::Sender<Job>,
}

impl Handle {
    pub(super) const fn new(jobs: mpsc::Sender<Job>) -> Self {
        Self { jobs }
    }

    /// Runs `job` on the daemon's task.
    async fn ask<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Daemon) -> Reply<T> + Send + 'static,
    ) -> Reply<T> {
        let ending = || Failure {
            status: 503,
            message: "the daemon is stopping".to_owned(),
        };
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |daemon| {
            // Whoever asked may have gone.
            let _ = reply.send(job(daemon));
        });
        self.jobs.send(job).await.map_err(|_| ending())?;
        answer.await.map_err(|_| ending())?
    }
}

/// Runs what takes long beside the daemon's task.
async fn beside<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> Reply<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Failure::internal(error.to_string()))?
        .map_err(Failure::from)
}

impl Control for Handle {
    async fn services(&self) -> Reply<Vec<types::Service>> {
        self.ask(|daemon| Ok(daemon.service_views()?)).await
    }

    async fn backends(&self, service: Option<String>) -> Reply<Vec<types::Backend>> {
        self.ask(move |daemon| Ok(daemon.backend_views(service.as_deref())?))
            .await
    }

    async fn connections(&self, filter: ConnectionFilter) -> Reply<Vec<types::Connection>> {
        let names = self.ask(|daemon| Ok(daemon.flow_names()?)).await?;
        beside(move || names.connections(&filter)).await
    }

    async fn connection_count(&self, filter: ConnectionFilter) -> Reply<u64> {
        let names = self.ask(|daemon| Ok(daemon.flow_names()?)).await?;
        beside(move || names.count(&filter)).await
    }

    async fn connection_flush(&self, filter: ConnectionFilter) -> Reply<u64> {
        let names = self.ask(|daemon| Ok(daemon.flow_names()?)).await?;
        beside(move || names.flush(&filter)).await
    }

    async fn drops(&self) -> Reply<Vec<types::Drops>> {
        self.ask(|daemon| Ok(daemon.drop_views()?)).await
    }

    async fn status(&self) -> Reply<types::Status> {
        let mut status = self.ask(|daemon| Ok(daemon.status_view()?)).await?;
        let pins = PathBuf::from(&status.pin_path);
        // Counting the entries walks the maps.
        status.maps = beside(move || Ok(Maps::open(&pins)?.status()?)).await?;
        Ok(status)
    }

    async fn set_admin(
        &self,
        service: String,
        backend: String,
        admin: Admin,
    ) -> Reply<types::Backend> {
        self.ask(move |daemon| daemon.set_admin(&service, &backend, admin))
            .await
    }

    async fn open_flows(&self, service: String, backend: String) -> Reply<types::OpenFlows> {
        let question = self
            .ask(move |daemon| daemon.open_flows(&service, &backend))
            .await?;
        let (names, number, sees_replies, others) = question;
        let open = match number {
            Some(number) => beside(move || names.open(number, sees_replies)).await?,
            None => 0,
        };
        Ok(types::OpenFlows { open, others })
    }

    async fn stop(&self) -> Reply<()> {
        self.ask(|daemon| {
            daemon.ended = true;
            Ok(())
        })
        .await
    }

    async fn reload(&self) -> Reply<()> {
        self.ask(Daemon::reload).await
    }
}
