from dist_dp.sharding import TableOptimizer
class RowOptimizer:
    def __init__(self, settings: TableOptimizer) -> None:
        self.settings = settings
    def update(self, shard, rows, gradient, *, learning_rate, weight_decay):
        if weight_decay:
            gradient = gradient + weight_decay * shard.weight[rows]
        shard.weight.index_add_(0, rows, gradient, alpha=-learning_rate)
