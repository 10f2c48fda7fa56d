import pytest
from agentrun.testing import BrokerContract


class TestNats(BrokerContract):
    @pytest.fixture
    def environments(self, nats_environments):
        return nats_environments
