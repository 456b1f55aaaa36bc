"""Inventory against real PostgreSQL and NATS: its own nouns, accounts and refusals, without any host."""

from __future__ import annotations

import hashlib

import pytest

from services.inventory.service import service
from tests.support.runtime import running
from volery.contracts.account import CHECK_TOKEN, CREATE_USER, LOGIN, CheckToken, CreateUser, Login
from volery.contracts.cluster import (
    CREATE_CLUSTER,
    CREATE_DATA_CENTER,
    DELETE_DATA_CENTER,
    UPDATE_CLUSTER,
    CreateCluster,
    CreateDataCenter,
    DeleteById,
    UpdateCluster,
)
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import CREATE_HOST, CreateHost
from volery.contracts.operation import ListQuery
from volery.contracts.template import LIST_TEMPLATES
from volery.runtime.programs import Settings


async def test_data_center_and_cluster(configured: Settings) -> None:
    async with running(configured, service) as bus:
        dc = await bus.ask(CREATE_DATA_CENTER, CreateDataCenter(name="Default"))
        cluster = await bus.ask(CREATE_CLUSTER, CreateCluster(name="Default", data_center_id=dc.id))
        new = await bus.ask(UPDATE_CLUSTER, UpdateCluster(id=cluster.id, memory_overcommit_percent=150))
        assert (new.revision, new.memory_overcommit_percent) == (2, 150)
        with pytest.raises(Refused) as refused:
            await bus.ask(UPDATE_CLUSTER, UpdateCluster(id=cluster.id, if_revision=1, description="x"))
        assert refused.value.kind is Kind.STALE
        with pytest.raises(Refused) as refused:
            await bus.ask(CREATE_DATA_CENTER, CreateDataCenter(name="Default"))
        assert refused.value.kind is Kind.CONFLICT
        with pytest.raises(Refused) as refused:
            await bus.ask(DELETE_DATA_CENTER, DeleteById(id=dc.id))
        assert "still has 1 clusters" in refused.value.message
        assert len((await bus.ask(LIST_TEMPLATES, ListQuery())).items) == 1
        token = await bus.ask(CREATE_HOST, CreateHost(name="h1", cluster_id=cluster.id))
        assert token.enrolment_token.startswith("volery-enrol.")


async def test_login_and_token(configured: Settings) -> None:
    async with running(configured, service) as bus:
        await bus.ask(CREATE_USER, CreateUser(name="ada", password="correct horse battery"))
        with pytest.raises(Refused) as refused:
            await bus.ask(LOGIN, Login(name="ada", password="wrong"))
        assert refused.value.kind is Kind.UNAUTHENTICATED
        issued = await bus.ask(LOGIN, Login(name="ada", password="correct horse battery"))
        _, token_id, secret = issued.secret.split("_", 2)
        digest = hashlib.sha256(secret.encode()).hexdigest()
        who = await bus.ask(CHECK_TOKEN, CheckToken(token_id=token_id, secret_sha256=digest))
        assert who.user_name == "ada"
        with pytest.raises(Refused):
            await bus.ask(CHECK_TOKEN, CheckToken(token_id=token_id, secret_sha256="0" * 64))
