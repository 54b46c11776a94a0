"""Builds the model of a run: TorchRec's DLRM, or whatever the user's factory returns."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from dist_dp.cluster.config import ModelConfig
from dist_dp.datasets.schema import DataSchema
from dist_dp.errors import ConfigError, ModelError
from dist_dp.file_names import why_no_path


def build_model(config: ModelConfig, schema: DataSchema, *, meta_tables: bool = True) -> nn.Module:
    """Builds the unsharded model.

    Args:
        config: The model's configuration.
        schema: Features and table sizes.
        meta_tables: Put DLRM's tables on the meta device (no memory): they are allocated and
            initialised shard by shard when the model is sharded.

    Returns:
        A module with ``forward(dense_features, sparse_features)`` that gives logits.

    Raises:
        ConfigError: The factory cannot be imported, or the schema does not fit the model.
    """
    if config.name == "custom":
        return _from_factory(config, schema)
    if not schema.dense:
        raise ConfigError(
            f"model.name '{config.name}' needs dense features and the data has none; declare some "
            "(data.columns.dense) or give a factory of your own (model.name: custom)"
        )
    from torchrec.models.dlrm import DLRM, DLRM_DCN

    collection = embedding_bags(schema, config.embedding_dim, meta=meta_tables)
    common: dict[str, Any] = {
        "embedding_bag_collection": collection,
        "dense_in_features": len(schema.dense),
        "dense_arch_layer_sizes": list(config.dense_arch),
        "over_arch_layer_sizes": list(config.over_arch),
    }
    if config.name == "dlrm":
        model: nn.Module = DLRM(**common)
    else:
        model = DLRM_DCN(
            **common,
            dcn_num_layers=config.dcn_layers,
            dcn_low_rank_dim=config.dcn_low_rank_dim,
        )
    return model


def embedding_bags(schema: DataSchema, embedding_dim: int, *, meta: bool = True) -> Any:
    """An EmbeddingBagCollection with one table for each table of a schema.

    Args:
        schema: Features, tables, pooling.
        embedding_dim: Columns of every table.
        meta: Allocate nothing yet.

    Raises:
        ConfigError: Features that share a table differ in pooling, or a name cannot be used.
    """
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, PoolingType

    tables: dict[str, EmbeddingBagConfig] = {}
    for feature in schema.sparse:
        pooling = PoolingType.SUM if feature.pooling == "sum" else PoolingType.MEAN
        # A module of torch for each table, and a folder of the release.
        why = why_no_path(feature.table_name)
        if why is not None or "." in feature.table_name:
            raise ConfigError(
                f"the table {feature.table_name!r} of feature '{feature.name}' {why or 'has a dot'}"
                ", so it can name neither a module nor a folder; give it another name (table)"
            )
        table = tables.get(feature.table_name)
        if table is None:
            tables[feature.table_name] = EmbeddingBagConfig(
                name=feature.table_name,
                num_embeddings=feature.num_embeddings,
                embedding_dim=embedding_dim,
                feature_names=[feature.name],
                pooling=pooling,
            )
        elif table.pooling != pooling:
            raise ConfigError(
                f"feature '{feature.name}' pools by {feature.pooling} but shares the table "
                f"'{feature.table_name}' with features that do not; give it a table of its own"
            )
        else:
            table.feature_names.append(feature.name)
    return EmbeddingBagCollection(
        tables=list(tables.values()),
        is_weighted=any(f.weight_column for f in schema.sparse),
        device=torch.device("meta" if meta else "cpu"),
    )


def _from_factory(config: ModelConfig, schema: DataSchema) -> nn.Module:
    assert config.factory is not None
    module_name, _, function = config.factory.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"model.factory '{config.factory}' cannot be imported: {error}; it must be importable "
            "on every worker (PYTHONPATH, or an installed package)"
        ) from error
    model = factory(schema, **config.factory_args)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model.factory '{config.factory}' returned a {type(model).__name__}, not a "
            "torch.nn.Module"
        )
    return model


def logits_of(model: nn.Module, batch: Any) -> Tensor:
    """Runs a model on a batch.

    Args:
        model: As built by :func:`build_model`.
        batch: A :class:`dist_dp.datasets.batch.ClickBatch`.

    Returns:
        Logits, float ``[batch]``.

    Raises:
        ModelError: The output has another shape.
    """
    logits: Tensor = model(batch.dense_features, batch.sparse_features)
    if logits.shape not in ((len(batch),), (len(batch), 1)):
        raise ModelError(
            f"the model gave a tensor of shape {tuple(logits.shape)} for {len(batch)} examples; "
            "it must give one logit per example"
        )
    return logits.reshape(-1)
